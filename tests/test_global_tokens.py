"""Global tokens, which attend to everything exactly and are columns of everyone: `skein_attention(global_mask=...)`."""

import pytest
import torch
from test_attention import SMALL, TOLERANCE, error, exact, inputs

from hf_skein import SkeinConfig, attention, skein_attention


METHODS = ("adaptive", "skeinformer")


def marks(n, *places):
    mask = torch.zeros(2, n, dtype=torch.long)
    for row, place in enumerate(places):
        mask[row, list(place)] = 1
    return mask


@pytest.mark.parametrize("variant", [{}, {"column_sampling": "uniform"}, {"row_normalization": "none"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_both_paths_agree_in_outputs_and_gradients(method, variant, poisoned):
    query, key, value = inputs(131, kv_heads=2, grad=True)
    mask, globals_ = torch.rand(2, 131) < 0.9, marks(131, range(40, 60), (5, 130))
    probe = torch.randn_like(query)
    results = []
    for backend in ("reference", "torch"):
        config = SkeinConfig(**{**SMALL, **variant, "method": method, "backend": backend})
        output = skein_attention(query, key, value, mask, config=config, global_mask=globals_)
        results.append([output, *torch.autograd.grad((output * probe).sum(), (query, key, value))])
    for reference, result in zip(*results, strict=True):
        assert error(result, reference) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("method", METHODS)
def test_global_rows_are_exact_and_global_keys_are_columns_on_top(method, monkeypatch):
    query, key, value = inputs(131)
    globals_ = marks(131, (3, 77, 130), range(50, 90))  # more than num_columns in the second sequence
    selections = []
    original = attention._SELECT[method]

    def select(*args):
        selections.append(original(*args))
        return selections[-1]

    monkeypatch.setitem(attention._SELECT, method, select)
    config = SkeinConfig(**{**SMALL, "method": method, "pilot_reutilization": False})
    output = skein_attention(query, key, value, config=config, global_mask=globals_)
    reference = exact(query, key, value)
    for row, selection in enumerate(selections):
        places = globals_[row].nonzero().squeeze(-1)
        assert error(output[row, :, places], reference[row, :, places]) < TOLERANCE[torch.float64]
        assert selection.columns.shape[-1] == SMALL["num_columns"] + len(places)
        is_column = torch.zeros(*selection.columns.shape[:2], 131, dtype=torch.bool).scatter_(
            -1, selection.columns, True
        )
        assert is_column.sum(-1).eq(selection.columns.shape[-1]).all()  # distinct
        assert is_column[..., places].all()
    plain = skein_attention(query, key, value, config=config)
    assert error(plain[:, :, 77], reference[:, :, 77]) > 1e-3  # else nothing was shown
    assert error(output, reference) < error(plain, reference)


def test_marks_in_the_padding_do_not_count_and_neighbours_do_not_matter():
    query, key, value = inputs(90)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1, 70:] = False
    globals_ = marks(90, (4, 9), (2, 69, 80))
    config = SkeinConfig(**SMALL)
    both = skein_attention(query, key, value, mask, config=config, global_mask=globals_)
    alone = skein_attention(
        query[1:, :, :70], key[1:, :, :70], value[1:, :, :70], config=config, global_mask=globals_[1:, :70].bool()
    )
    assert error(both[1:, :, :70], alone) < TOLERANCE[torch.float64]
    nothing = skein_attention(query, key, value, mask, config=config, global_mask=torch.zeros(1, 90))
    assert torch.equal(nothing, skein_attention(query, key, value, mask, config=config))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [80, 84, 90, 100])  # of 100, with 16 columns besides
def test_so_many_that_nothing_is_left_to_sketch_is_exact(method, count):
    query, key, value = inputs(100)
    config = SkeinConfig(**{**SMALL, "method": method})
    output = skein_attention(query, key, value, config=config, global_mask=marks(100, range(count), range(count)))
    assert (error(output, exact(query, key, value)) < TOLERANCE[torch.float64]) is (count >= 84)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_mask": torch.ones(2, 39)}, r"\[batch, n\] = \[2, 40\].*got \(2, 39\)"),
        ({"global_mask": torch.ones(2, 39, dtype=torch.bool)}, r"got \(2, 39\) with values from True to True"),
        ({"global_mask": torch.full((2, 40), 2)}, "values from 2 to 2"),
        ({"global_mask": torch.ones(2, 40), "query_mask": torch.ones(2, 40)}, "40 keys and a query_mask"),
        ({"global_mask": torch.ones(2, 40), "config": SkeinConfig(method="vmean")}, 'method="vmean"'),
    ],
)
def test_wrong_masks_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        skein_attention(*inputs(40), **arguments)
    query, key, value = inputs(30, 40)
    with pytest.raises(ValueError, match="30 queries, 40 keys"):
        skein_attention(query, key, value, global_mask=torch.ones(2, 40))
