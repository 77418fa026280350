"""The domain mixture: how proportions change, and which domain and sample come at a global position.

Shapes: K domains; every per-domain list or array is [K], in the order of `set_names`.

Proportions follow DoReMi (arXiv:2305.10429) as Sheared LLaMA uses it (arXiv:2310.06694, algorithm 1):

    q' = softmax(ln q + eta (loss - target)),   q = (1 - c) q' + c / K,   renormalised in float64

Positions follow Tijdeman's answer to the chairman assignment problem (Discrete Math. 32, 1980): among the
domains that may come, take the one whose deadline is earliest. It needs no random numbers, so the mixture has
no noise.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmshearing.data.mixture.order import BLOCK_LIMIT, DomainOrder, mix
from llmshearing.errors import ShearingError

Draw = tuple[int, int]  # (domain index, number of the draw from this domain since the start)
MIXINGS = ("exact", "multinomial")
ETA = 1.0  # step of the update, arXiv:2310.06694 section 2.2
SMOOTHING = 1e-4  # c, keeps every domain reachable
SUM_TOLERANCE = 1e-6  # proportions typed by hand may miss 1 by this much; they are renormalised
ROUNDING = 1e-9  # float64 deficits are exact to about 1e-15 per 1e0; ties closer than this are ties


def update_proportion(
    update_type: str,
    proportion: Sequence[float] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    target_loss: Sequence[float] | np.ndarray,
    eta: float = ETA,
    c: float = SMOOTHING,
    clamp_excess: bool = False,
) -> np.ndarray:
    """Return the proportions [K] (float64, sum 1) that hold after an evaluation.

    `losses` and `target_loss` [K] are mean cross-entropies in nats per token. `constant` keeps `proportion`.
    A loss or target that is not finite counts as no excess, so a domain without a measurement spreads
    nothing.

    The softmax runs in float32 and the result is renormalised in float64, as in the runs behind the published
    models; `constant` passes through the same float32. `reference-vectors/doremi_updates.json` records this.

    Raises ShearingError for an unknown `update_type`, lengths that differ, or proportions that are no
    distribution.
    """
    start = check_proportion(proportion, len(losses))
    if len(target_loss) != len(start):
        raise ShearingError(f"target_loss has {len(target_loss)} values for {len(start)} domains")
    single = torch.as_tensor(start).float()
    if update_type == "doremi":
        excess = torch.as_tensor(np.asarray(losses, np.float64)).float()
        excess = excess - torch.as_tensor(np.asarray(target_loss, np.float64)).float()
        excess = torch.nan_to_num(excess, nan=0.0, posinf=0.0, neginf=0.0)
        excess = excess.clamp_min(0) if clamp_excess else excess
        # the logarithm is rounded once: torch's own in float32 is off by one unit on some CPUs (MKL, 7 % of values)
        logits = torch.log(single.double()).float() + eta * excess
        single = (1 - c) * torch.softmax(logits, dim=0) + c / len(start)
    elif update_type != "constant":
        raise ShearingError(f"update_type is {update_type!r}; known are 'doremi' and 'constant'")
    updated = single.numpy().astype(np.float64)
    return updated / updated.sum()


def doremi_update(
    proportion: Sequence[float] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    target_loss: Sequence[float] | np.ndarray,
    *,
    eta: float = ETA,
    c: float = SMOOTHING,
    clamp_excess: bool = False,
) -> np.ndarray:
    """`update_proportion("doremi", ...)`."""
    return update_proportion("doremi", proportion, losses, target_loss, eta, c, clamp_excess)


def check_proportion(proportion: Sequence[float] | np.ndarray, domains: int) -> np.ndarray:
    """Return `proportion` as float64 [domains] with sum 1; raises ShearingError where it is no
    distribution."""
    values = np.asarray(proportion, dtype=np.float64)
    if values.shape != (domains,):
        raise ShearingError(f"proportion has {values.size} values for {domains} domains; give one a domain")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ShearingError(f"proportion {values.tolist()} has a value that is negative or not finite")
    if abs(values.sum() - 1) > SUM_TOLERANCE:
        raise ShearingError(f"proportion {values.tolist()} sums to {values.sum():.8g}, not to 1")
    # what was normalised once stays bit for bit what it was: a restored mixture is not a changed one
    return values if abs(values.sum() - 1) < 1e-15 * domains else values / values.sum()


class Interleaver:
    """Which domain comes next, so that counts follow the proportions.

    A domain's *deficit* is what its proportions have promised so far minus how often it came. After every
    step:

    - while proportions have been constant from the start, each deficit is within 1 - 1/(2K - 2) of 0
      (Tijdeman's bound, the best there is), so every count is within 1 of its cumulated proportion;
    - whatever the history of changes, each deficit is above -1 and below H_K = 1 + 1/2 + ... + 1/K: a domain
      comes only when its deficit is positive enough, and overdue domains are served largest deficit first.

    A proportion set to 0 forfeits the domain's deficit, which the others share (the second bound then holds
    from there on up to that share). State: carried deficit, count and proportion of each domain, and one step
    count.
    """

    def __init__(self, proportion: Sequence[float] | np.ndarray) -> None:
        self.proportion: list[float] = [float(q) for q in proportion]
        self.carried: list[float] = [0.0] * len(self.proportion)  # deficits when the proportions last changed
        self._restart()

    def _restart(self) -> None:
        self.steps = 0  # since the proportions last changed
        self.counts = [0] * len(self.proportion)
        active = sum(q > 0 for q in self.proportion)
        self._floor = 1 / (2 * max(active, 2) - 2)

    def deficits(self) -> list[float]:
        """Promised minus delivered, [K]; computed afresh from counts, so that rounding does not pile up."""
        terms = zip(self.carried, self.proportion, self.counts, strict=True)
        return [carried + self.steps * q - count for carried, q, count in terms]

    def set_proportion(self, proportion: Sequence[float] | np.ndarray) -> None:
        """Let `proportion` [K] (sum 1) hold from the next step on; deficits carry over."""
        new = [float(q) for q in proportion]
        if new == self.proportion:
            return
        deficits = self.deficits()
        forfeited = sum(d for d, q in zip(deficits, new, strict=True) if q == 0)
        self.carried = [d + forfeited * q if q > 0 else 0.0 for d, q in zip(deficits, new, strict=True)]
        self.proportion = new
        self._restart()

    def next(self) -> int:
        """The domain at the next global position."""
        self.steps += 1
        ceiling = 1 - self._floor
        best, best_key = -1, (2, math.inf)
        for domain, q in enumerate(self.proportion):
            due = self.carried[domain] + self.steps * q - self.counts[domain]
            if due > ceiling + ROUNDING:  # overdue: left out now, it would break the bound
                key = (0, -due)
            elif due >= self._floor - ROUNDING and q > 0:  # may come; steps left until it must
                key = (1, (ceiling - due) / q)
            else:
                continue
            if key < best_key:
                best, best_key = domain, key
        self.counts[best] += 1
        return best


class Mixture:
    """The endless global sequence of (domain, draw): a function of seed, position and history of proportions.

    `mixing` is `exact` (the interleaving above) or `multinomial` (each position an independent draw from the
    proportions, keyed by seed and position, as the predecessor's was in distribution).
    `blocks` [K]: samples of a shard, for the shuffle's locality.
    """

    def __init__(
        self,
        set_names: Sequence[str],
        sizes: Sequence[int],
        proportion: Sequence[float] | np.ndarray,
        seed: int,
        shuffle: bool = True,
        *,
        mixing: str = "exact",
        blocks: Sequence[int] | None = None,
    ) -> None:
        if mixing not in MIXINGS:
            raise ShearingError(f"mixing is {mixing!r}; known are {' and '.join(map(repr, MIXINGS))}")
        self.set_names = list(set_names)
        self.seed, self.mixing = seed, mixing
        self.position = 0  # samples given out since the start of training, over all ranks
        self.interleaver = Interleaver(check_proportion(proportion, len(self.set_names)))
        shards = zip(self.set_names, sizes, blocks or [BLOCK_LIMIT] * len(sizes), strict=True)
        self.orders = [DomainOrder(name, size, seed, shuffle, block) for name, size, block in shards]
        self.drawn = [0] * len(self.set_names)

    @property
    def proportion(self) -> np.ndarray:
        """The proportions [K] that hold for the next position, float64."""
        return np.array(self.interleaver.proportion, dtype=np.float64)

    def set_proportion(self, proportion: Sequence[float] | np.ndarray) -> None:
        """Let `proportion` [K] hold from the next position on; raises ShearingError if it is no
        distribution."""
        self.interleaver.set_proportion(check_proportion(proportion, len(self.set_names)))

    def next(self) -> Draw:
        """(domain index, number of the draw from this domain) at the next position."""
        domain = self.interleaver.next() if self.mixing == "exact" else self._multinomial()
        self.position += 1
        draw = self.drawn[domain]
        self.drawn[domain] += 1
        return domain, draw

    def _multinomial(self) -> int:
        point = mix(self.seed, 2, self.position) / 2**64
        cumulated = np.cumsum(self.interleaver.proportion)
        return int(np.searchsorted(cumulated, point * cumulated[-1], side="right"))

    def sample(self, draw: Draw) -> int:
        """Sample id, inside its domain, of a draw."""
        return self.orders[draw[0]](draw[1])

    def fork(self) -> "Mixture":
        """A copy to look ahead with: it advances alone. Orders are shared, they have no position."""
        copied = copy.copy(self)
        copied.interleaver = copy.deepcopy(self.interleaver)
        copied.drawn = list(self.drawn)
        return copied

    def state_dict(self) -> dict[str, Any]:
        """A few plain numbers a domain; loads with `weights_only=True`."""
        mixer = self.interleaver
        return {
            "version": 2,
            "seed": self.seed,
            "mixing": self.mixing,
            "position": self.position,
            "steps": mixer.steps,
            "set_names": list(self.set_names),
            "sizes": [order.size for order in self.orders],
            "blocks": [order.block for order in self.orders],
            "drawn": list(self.drawn),
            "proportion": list(mixer.proportion),
            "carried": list(mixer.carried),
            "counts": list(mixer.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the recorded position; raises ShearingError if this is not the recorded data and
        seed."""
        here = self.state_dict()
        fixed = ("version", "seed", "mixing", "set_names", "sizes", "blocks")
        differ = [key for key in fixed if state.get(key) != here[key]]
        if differ:
            lines = [f"  {key}: {state.get(key)} in the checkpoint, {here[key]} here" for key in differ]
            raise ShearingError("The checkpoint's data position belongs to other data:\n" + "\n".join(lines))
        mixer = self.interleaver
        mixer.set_proportion(state["proportion"])
        mixer.carried, mixer.counts, mixer.steps = (
            list(state["carried"]),
            list(state["counts"]),
            state["steps"],
        )
        self.position = state["position"]
        self.drawn = list(state["drawn"])
