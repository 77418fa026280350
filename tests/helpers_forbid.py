"""Makes Composer, Streaming and what they bring as good as not installed in this process."""

import sys

FORBIDDEN = {"composer", "streaming", "boto3", "oci", "azure", "paramiko"}


class _Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])


def install():
    """From now on; nothing of them may have been imported."""
    found = FORBIDDEN & {name.partition(".")[0] for name in sys.modules}
    if found:
        raise RuntimeError(f"imported already: {sorted(found)}")
    sys.meta_path.insert(0, _Forbid())
