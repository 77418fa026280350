"""OBS columns against a slow float64 version that inverts again after every removal, and against least squares."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.errors import ShearingError
from llmshearing.prune.methods.obs.linalg import damped_inverse, remove_units, shrinking_groups, unit_scores


def problem(outputs, columns, tokens, seed):
    """Weight and correlated inputs [columns, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(columns, tokens, generator=generator, dtype=torch.float64)
    return torch.randn(outputs, columns, generator=generator, dtype=torch.float64), inputs


def slow_removal(weight, hessian, width, rows, remove, groups):
    """The definition: invert what is left in every round, score every unit by a dense solve, compensate."""
    weight, units = weight.clone(), list(range(weight.shape[1] // width))
    per_row, left = len(units) // rows, [remove] * rows
    for size in groups:
        columns = [unit * width + i for unit in units for i in range(width)]
        inverse = torch.linalg.inv(hessian[columns][:, columns])
        at = {unit: slice(i * width, (i + 1) * width) for i, unit in enumerate(units)}
        cost = {}
        for unit in units:
            block, own = inverse[at[unit], at[unit]], weight[:, unit * width : (unit + 1) * width]
            cost[unit] = torch.trace(own @ torch.linalg.inv(block) @ own.T).item()
        gone = []
        for unit in sorted(units, key=cost.get):
            if left[unit // per_row] and len(gone) < size:
                left[unit // per_row] -= 1
                gone.append(unit)
        inner = [i for unit in sorted(gone) for i in range(at[unit].start, at[unit].stop)]
        outer = [columns[i] for i in inner]
        step = weight[:, outer] @ torch.linalg.inv(inverse[inner][:, inner]) @ inverse[inner]
        weight[:, columns] -= step
        weight[:, outer] = 0
        units = [unit for unit in units if unit not in gone]
    return units, weight


@given(
    width=st.integers(1, 4), rows=st.integers(1, 3), per_row=st.integers(2, 5), outputs=st.integers(1, 6),
    groups=st.sampled_from([(1, 1), (3, 1), (4, 2)]), seed=st.integers(0, 10**6), data=st.data(),
)  # fmt: skip
def test_same_columns_and_weights_as_inverting_again(width, rows, per_row, outputs, groups, seed, data):
    weight, inputs = problem(outputs, width * rows * per_row, 200, seed)
    remove = data.draw(st.integers(0, per_row))
    hessian, sizes = 2 * inputs @ inputs.T, list(shrinking_groups(remove * rows, *groups))
    options = {"width": width, "rows": rows, "largest": groups[0], "smallest": groups[1]}
    kept, fast = remove_units(weight, damped_inverse(hessian, 0.0), remove, **options)
    slow_kept, slow = slow_removal(weight, hessian, width, rows, remove, sizes)
    assert kept.tolist() == slow_kept
    assert len(kept) == rows * (per_row - remove)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-6)


@given(seed=st.integers(0, 10**6), percdamp=st.sampled_from([0.0, 0.01, 1.0]), remove=st.integers(1, 11))
def test_compensation_is_never_worse_than_plain_removal(seed, percdamp, remove):
    weight, inputs = problem(5, 12, 100, seed)
    kept, new = remove_units(weight, damped_inverse(2 * inputs @ inputs.T, percdamp), remove)
    plain = torch.zeros_like(weight)
    plain[:, kept] = weight[:, kept]
    assert ((new - weight) @ inputs).square().sum() <= ((plain - weight) @ inputs).square().sum() * (1 + 1e-12)


@pytest.mark.parametrize("width", [1, 3])
def test_new_weights_are_the_least_squares_solution_and_scores_its_error(width):
    weight, inputs = problem(4, 12, 80, seed=3)
    inverse = damped_inverse(2 * inputs @ inputs.T, 0.0)
    kept, new = remove_units(weight, inverse, 12 // width - 2, width=width)
    columns = [int(unit) * width + i for unit in kept for i in range(width)]
    best = torch.linalg.lstsq(inputs[columns].T, (weight @ inputs).T).solution.T
    torch.testing.assert_close(new[:, columns], best)
    alone, one = remove_units(weight, inverse, 1, width=width)
    gone = next(unit for unit in itertools.count() if unit not in alone.tolist())
    error = ((one - weight) @ inputs).square().sum()
    torch.testing.assert_close(unit_scores(weight, inverse, width)[gone], 2 * error)
    assert unit_scores(weight, inverse, width).argmin() == gone


def test_float32_chooses_the_same_columns():
    weight, inputs = problem(32, 96, 2000, seed=5)
    hessian = 2 * inputs @ inputs.T
    exact = remove_units(weight, damped_inverse(hessian, 0.01), 48, largest=16, smallest=4)
    single = remove_units(weight.float(), damped_inverse(hessian.float(), 0.01), 48, largest=16, smallest=4)
    assert single[0].tolist() == exact[0].tolist()
    torch.testing.assert_close(single[1].double(), exact[1], atol=1e-3, rtol=1e-3)


def test_dead_inputs_go_first_and_do_no_harm():
    weight, inputs = problem(4, 10, 60, seed=1)
    inputs[[2, 7]] = 0
    kept, new = remove_units(weight, damped_inverse(2 * inputs @ inputs.T, 0.0), 2)
    assert kept.tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    torch.testing.assert_close(new @ inputs, weight @ inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_depend_on_one_another_are_refused(dtype):
    weight, inputs = problem(4, 40, 30, seed=1)  # fewer tokens than inputs
    hessian = (2 * inputs @ inputs.T).to(dtype)
    with pytest.raises(ShearingError, match="singular.*raise percdamp"):
        damped_inverse(hessian, 0.0)
    assert damped_inverse(hessian, 0.01).isfinite().all()
    with pytest.raises(ShearingError, match="not finite"):
        damped_inverse(hessian * float("inf"), 0.01)


@given(remove=st.integers(0, 2000), smallest=st.integers(1, 16), more=st.integers(0, 1000))
def test_groups_add_up_and_shrink(remove, smallest, more):
    sizes = list(shrinking_groups(remove, smallest + more, smallest))
    assert sum(sizes) == remove
    assert sizes == sorted(sizes, reverse=True)
    assert all(smallest <= size <= smallest + more for size in sizes[:-1])
