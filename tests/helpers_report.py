"""Records made by hand, by closed forms instead of training."""

import numpy as np

from llmshearing.report.maps import encoded
from llmshearing.report.record import Recorder

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">'


def pruning(folder, batches=20, title=HOSTILE, end=True, evaluated=True):
    """The record of a pruning run."""
    record = Recorder(folder).start(
        "train", title, about={"source": HOSTILE}, history=[HOSTILE], config=f"a: {HOSTILE}"
    )
    record.table("Sizes", ["source", HOSTILE], [["hidden", 8, 4], [HOSTILE, 1.5, None]])
    for batch in range(1, batches + 1):
        values = {
            "loss/train/cross_entropy": 5 - batch / 10,
            f"loss/train/{HOSTILE}": 4.0,
            "loss/train/web": float("nan"),
        }
        values |= {"pruning/open_units/hidden": 8 - batch / 5, "pruning/wanted_units/hidden": 4.0}
        values |= {"pruning/lambda_1/hidden": -batch / 2, "pruning/lambda_2/hidden": batch / 3, "other/thing": batch}
        record.step(batch, batch * 100, 0.5, values)
        if evaluated and batch % 5 == 0:
            loss = {"web": 4 - batch / 20, HOSTILE: 3.0}
            record.evaluation(batch, batch * 100, 3.5 - batch / 40, loss, {"web": batch / 20, HOSTILE: 1 - batch / 20})
            open_units = 8 - batch // 5
            hidden = (np.arange(8) < open_units)[None]
            inner = np.arange(300)[None] < np.array([[300 - 10 * batch], [150], [0]])
            maps = {"hidden": encoded(hidden), "intermediate": encoded(inner), "layer": encoded([[1], [1], [0]])}
            record.maps(batch, {"kept": maps, "open": {kind: encoded(np.full((3, 4), 0.5)) for kind in maps}})
    record.note(HOSTILE, warning=True)
    record.points("parameters", "loss", [{"name": HOSTILE, "x": 1, "y": 2.0, "error": 0.1, "marked": True}])
    if end:
        record.end(batches)
    return folder
