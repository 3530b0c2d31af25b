"""`backend="triton"` from end to end: selection and attention composed, dispatch, and what PyTorch asks."""

import logging
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import triton.language as tl
from test_attention import error, exact
from test_registration import TINY
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, BertConfig

import hf_skein
from hf_skein import SkeinConfig, attention, skein_attention
from hf_skein.kernels import ops, tiles


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SMALL = {"num_columns": 16, "num_strata": 8, "block_size": 32, "min_length": 0, "backend": "triton"}

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")


def inputs(n_q, n_k=None, batch=1, heads=2, kv_heads=1, p=24, dtype=torch.float32):
    shapes = (n_q, heads, p), (n_k or n_q, kv_heads, p), (n_k or n_q, kv_heads, p)
    return tuple(torch.randn(batch, *s, device=DEVICE, dtype=dtype).transpose(1, 2) for s in shapes)


def in_float64(query, key, value, mask=None, **settings):
    return skein_attention(
        *(x.double() for x in (query, key, value)), mask, config=SkeinConfig(**{**SMALL, **settings})
    )


# --- end to end ---


def test_adaptive_is_as_accurate_as_the_reference(poisoned):
    """A choice is not continuous, so the outputs differ a little; the errors do not."""
    query, key, value = inputs(200, heads=4, kv_heads=2)
    query, key = 2 * query, 1.5 * key
    wanted = exact(query.double(), key.double(), value.double())
    output = skein_attention(query, key, value, config=SkeinConfig(**SMALL))
    assert output.dtype == torch.float32
    reference = in_float64(query, key, value, backend="reference")
    assert error(output, wanted) == pytest.approx(error(reference, wanted), rel=0.04)


@pytest.mark.parametrize(("residual", "is_reused"), [(None, True), ("second_order", False)])
def test_skeinformer_draws_what_the_reference_draws(residual, is_reused, poisoned):
    query, key, value = inputs(90)
    mask = torch.rand(1, 90, device=DEVICE) < 0.9
    settings = {"method": "skeinformer", "residual": residual, "pilot_reutilization": is_reused, "seed": 3}
    settings["num_strata"] = 1
    output = skein_attention(query, key, value, mask, config=SkeinConfig(**{**SMALL, **settings}), layer=2)
    settings["backend"] = "reference"
    reference = skein_attention(
        *(x.double() for x in (query, key, value)), mask, config=SkeinConfig(**{**SMALL, **settings}), layer=2
    )
    assert error(output, reference) < 2e-6


@pytest.mark.parametrize(("dropout", "passes"), [(0.0, 1), (0.1, 2)])
def test_the_papers_pilots_are_attended_to_once(dropout, passes, monkeypatch):
    calls, forward = [], ops.exact._forward
    monkeypatch.setattr(ops.exact, "_forward", lambda *args: calls.append(0) or forward(*args))
    skein_attention(*inputs(40), config=SkeinConfig(**SMALL, method="skeinformer"), dropout=dropout)
    assert len(calls) == passes


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_batch_neighbours_and_padding_change_nothing(method, poisoned):
    config = SkeinConfig(**SMALL, method=method)
    query, key, value = inputs(80, batch=3)
    mask = torch.arange(80, device=DEVICE) < torch.tensor([[70], [41], [0]], device=DEVICE)
    mask[1] = mask[1].roll(13)
    spoilt = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (query, key, value)]
    together = skein_attention(*spoilt, mask, config=config)
    assert (together.masked_select(~mask[:, None, :, None]) == 0).all()
    for i in range(2):
        alone = skein_attention(*(x[i : i + 1, :, mask[i]] for x in (query, key, value)), config=config)
        assert torch.equal(together[i : i + 1, :, mask[i]], alone)


@pytest.mark.parametrize("n", [1, 17])
def test_tiny_lengths(n, poisoned):
    config = SkeinConfig(**{**SMALL, "num_columns": n - 1 or 1, "num_strata": 3})
    query, key, value = inputs(n)
    output = skein_attention(query, key, value, config=config)
    assert error(output, exact(query.double(), key.double(), value.double())) < (1e-6 if n == 1 else 0.2)


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_a_batch_that_is_short_enough_is_exact_without_masks_too(method, poisoned):
    """As somebody calls the kernels who has them from the Hub."""
    query, key, value = (x.requires_grad_() for x in inputs(40))
    output = ops.skein_attention(query, key, value, method=method, num_columns=16)
    wanted = exact(query, key, value)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(output)
    grads, expected = (torch.autograd.grad(x, (query, key, value), gradient) for x in (output, wanted))
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-5)
    assert ops.skein_attention(query[:, :, :0], key, value).shape == (1, 2, 0, 24)


def test_a_mask_may_be_a_transposed_view(poisoned):
    query, key, value = inputs(60, batch=3)
    mask = (torch.rand(60, 3, device=DEVICE) < 0.7).T
    config = SkeinConfig(**SMALL)
    assert not mask.is_contiguous()
    output = skein_attention(query, key, value, mask, config=config)
    assert torch.equal(output, skein_attention(query, key, value, mask.contiguous(), config=config))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_a_mask_may_have_another_dtype(dtype, poisoned):
    query, key, value = inputs(60, batch=2)
    mask = torch.rand(2, 60, device=DEVICE) < 0.7
    output = ops.skein_attention(query, key, value, 3 * mask.to(dtype), num_columns=16, exact_length=16)
    assert torch.equal(output, ops.skein_attention(query, key, value, mask, num_columns=16, exact_length=16))


@pytest.mark.parametrize(
    "options", [{"exact_rows": 0, "block_size": 64}, {"method": "skeinformer", "pilot_reutilization": False}]
)
def test_one_head_without_exact_rows(options, poisoned):
    """Where the order of the queries is that of the layout, the operator must not return it twice."""
    query, key, value = inputs(40, heads=1)
    output = ops.skein_attention(query, key, value, num_columns=16, exact_length=16, **options)
    assert error(output, exact(query, key, value)) < 0.5


def test_without_keys_rows_are_zero():
    query, key, value = inputs(5, 1)
    assert torch.equal(ops.skein_attention(query, key[:, :, :0], value[:, :, :0]), torch.zeros_like(query))


def test_more_pilots_than_the_kernels_have_room_for():
    query, key, value = inputs(40)
    config = SkeinConfig(**{**SMALL, "max_blocks": 64, "num_pilots": 2048, "block_size": 1})
    with pytest.raises(ValueError, match=r"up to 65535 pilots .* there may be 81920"):
        skein_attention(query, key, value, config=config)
    assert attention.why_no_kernels(config, query, value)  # `auto` goes by this


def test_exact_is_decided_per_sequence(poisoned):
    query, key, value = inputs(40, batch=2)
    mask = torch.arange(40, device=DEVICE) < torch.tensor([[40], [30]], device=DEVICE)
    output = skein_attention(query, key, value, mask, config=SkeinConfig(**{**SMALL, "min_length": 30}))
    wanted = exact(*(x[1:, :, :30].double() for x in (query, key, value)))
    assert error(output[1:, :, :30], wanted) < 1e-6
    assert error(output[:1], exact(*(x[:1].double() for x in (query, key, value)))) > 1e-3


def test_dropout_is_drawn_from_the_global_generator():
    query, key, value = inputs(60)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(skein_attention(query, key, value, config=SkeinConfig(**SMALL), dropout=0.3))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# --- dispatch ---


def test_auto_takes_the_kernels_on_a_gpu_only(monkeypatch):
    query, _, value = inputs(4)
    assert attention._backend(SkeinConfig(), query.cpu(), value) == "auto"
    meta = type("", (), {"device": torch.device("cuda"), "dtype": torch.float16, "shape": (1, 1, 4, 64)})()
    assert attention._backend(SkeinConfig(), meta, meta) == "triton"
    assert attention._backend(SkeinConfig(backend="torch"), meta, meta) == "torch"


@pytest.mark.parametrize(
    ("settings", "dtype", "p", "reason"),
    [
        ({"method": "vmean"}, torch.float32, 16, 'method="vmean" has no kernel'),
        ({"row_normalization": "none"}, torch.float32, 16, 'row_normalization="none", an ablation'),
        ({}, torch.float64, 16, "the inputs are torch.float64"),
        ({}, torch.float32, 264, "heads of up to 256 numbers; the inputs have 264"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_and_logged_by_auto(settings, dtype, p, reason, caplog):
    query, key, value = inputs(20, p=p, dtype=dtype)
    with pytest.raises(ValueError, match=r'backend="triton" cannot compute this: .*Use backend="auto" or "torch"') as e:
        skein_attention(query, key, value, config=SkeinConfig(**SMALL, **settings))
    assert reason in str(e.value)
    attention._log_no_kernels.cache_clear()
    gpu = type("", (), {"device": torch.device("cuda"), "dtype": dtype, "shape": query.shape})()
    with caplog.at_level(logging.WARNING):
        assert attention._backend(SkeinConfig(**{**SMALL, **settings, "backend": "auto"}), gpu, gpu) == "torch"
    assert reason in caplog.text


def test_global_tokens_are_refused_and_left_to_pytorch_by_auto():
    query, key, value = inputs(40)
    marked = torch.zeros(query.shape[0], 40, dtype=torch.bool, device=query.device)
    marked[:, 3] = True
    with pytest.raises(ValueError, match='backend="triton" cannot compute this: global tokens have no kernel'):
        skein_attention(query, key, value, global_mask=marked, config=SkeinConfig(**SMALL))
    gpu = type("", (), {"device": torch.device("cuda"), "dtype": query.dtype, "shape": query.shape})()
    assert attention._backend(SkeinConfig(), gpu, gpu, marked) == "torch"


def test_without_a_gpu_and_without_the_interpreter_it_says_so(monkeypatch):
    monkeypatch.setattr(ops, "INTERPRETED", tl.constexpr(False))
    query, key, value = (x.cpu() for x in inputs(20))
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device"):
        skein_attention(query, key, value, config=SkeinConfig(**SMALL))
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device"):
        ops.skein_attention(query, key, value)


def test_gpus_that_triton_does_not_know_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(ops, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    gpu = type("", (), {"device": torch.device("cuda"), "dtype": torch.float16, "shape": (1, 1, 4, 64)})()
    assert attention._backend(SkeinConfig(), gpu, gpu) == "torch"
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability \(8, 0\); cuda has \(7, 5\)"):
        attention._backend(SkeinConfig(backend="triton"), gpu, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert attention._backend(SkeinConfig(), gpu, gpu) == "triton"
    is_old = torch.compile(
        lambda x: x + (ops._capability(x.device) < ops.LEAST_CAPABILITY), fullgraph=True, backend="eager"
    )
    assert is_old(torch.zeros(1)) == 0


def test_everything_is_launched_on_the_device_of_the_inputs(monkeypatch):
    current, launches = [], []

    @contextmanager
    def device_of(x):
        current.append(x)
        yield
        current.pop()

    def wrapped(function):
        def call(*args, **kwargs):
            launches.append((function.__name__, bool(current)))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    places = (
        (ops, "ragged"), (ops.selection, "adaptive"), (ops, "residual"),
        (ops.attention, "forward"), (ops.attention, "backward"), (ops.exact, "forward"), (ops.exact, "backward"),
    )  # fmt: skip
    for where, name in places:
        monkeypatch.setattr(where, name, wrapped(getattr(where, name)))
    query, key, value = (x.requires_grad_() for x in inputs(20, batch=1, heads=2))
    skein_attention(query, key, value, config=SkeinConfig(**SMALL)).sum().backward()
    assert {name for name, _ in launches} == {name for _, name in places}
    assert all(is_guarded for _, is_guarded in launches), launches


class Launches(TorchDispatchMode):
    """Counts PyTorch's operators that do work."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.count += not (function.is_view or any(word in name for word in ("empty", "split", "fill_")))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_few_kernels_are_launched(method, monkeypatch):
    """As many as the documentation says, at the default sizes of the selection."""
    for name in ("select", "attend"):  # what an operator does within is hidden from the mode
        monkeypatch.setattr(ops, name, getattr(ops, name)._init_fn)
    kernel, run = type(ops.attention.forward_kernel), []
    monkeypatch.setattr(kernel, "run", lambda self, *args, **kwargs: run.append(self))
    # Nothing is computed, but positions are looked up.
    monkeypatch.setattr(torch, "empty", lambda *args, empty=torch.empty, **kwargs: empty(*args, **kwargs).fill_(0))
    query, key, value = inputs(1100, heads=1)
    options = {"num_pilots": 128, "kind": "geometric"} if method == "skeinformer" else {}
    with Launches() as others:
        ops.skein_attention(query, key, value, method=method, block_size=64, max_blocks=16, **options)
    text = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    assert f"`{method}` {len(run)} launches of kernels and {others.count} of PyTorch" in " ".join(text.split())


def test_a_graph_that_is_captured_does_not_wait_for_the_mask(monkeypatch):
    mask = type("", (), {"is_cuda": True})()  # there is nothing to look into
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert attention._none_if_all(mask) is mask


def test_float32_is_rounded_to_tf32_only_where_pytorch_allows_it(monkeypatch):
    x = torch.zeros(1, device=DEVICE)
    assert tiles.precision(x) == "ieee" and tiles.precision(x.half()) == "tf32"
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # after which PyTorch refuses to tell `allow_tf32`
        assert tiles.precision(x) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    monkeypatch.setattr(tiles, "ON_ROCM", True)
    assert tiles.precision(x.half()) == "ieee"  # Triton refuses TF32 on most of AMD's GPUs


def test_no_kernel_waits_at_a_barrier():
    """On AMD it would not wait for what other threads write to memory."""
    for source in Path(tiles.__file__).parent.glob("*.py"):
        assert "debug_barrier" not in source.read_text(), source.name


def test_a_kernel_that_fails_raises(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(type(ops.attention.forward_kernel), "run", fail)
    with pytest.raises(RuntimeError, match="out of shared memory"):
        skein_attention(*inputs(20), config=SkeinConfig(**SMALL))


@pytest.mark.parametrize(
    "change", [{"method": "vmean"}, {"kind": "none"}, {"exact_length": 100}], ids=["method", "kind", "exact_length"]
)
def test_wrong_options_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ops.skein_attention(*inputs(20), **change)


# --- a citizen of PyTorch ---


def test_opcheck(poisoned):
    query, key, value = (x.requires_grad_() for x in inputs(20, batch=2, p=16))
    detached = [x.detach() for x in (query, key, value)]
    mask = torch.arange(20, device=DEVICE) < torch.tensor([[20], [6]], device=DEVICE)
    for method in ("adaptive", "skeinformer"):
        settings = (method, 3 if method == "adaptive" else 1, 8, 8, 4, 4, 1, 1, True, False, 0, 0, 0.25)
        torch.library.opcheck(ops.select, (*detached, mask, mask, *settings))
    settings = ("adaptive", 3, 8, 8, 4, 4, 1, 1, True, False, 0, 0, 0.25)
    constants = ops.select(*detached, mask, mask, *settings)
    options = (constants, torch.tensor([3], device=DEVICE), True, 3, 8, 4, "second_order", 0.25, 0.5)
    torch.library.opcheck(ops.attend, (query, key, value, *options))
    output, lse = (x.detach() for x in ops.attend(query, key, value, *options))
    torch.library.opcheck(ops.attend_backward, (torch.randn_like(output), *detached, output, lse, *options))


def bert(skein, **fields):
    torch.manual_seed(0)
    sizes = {**TINY, "num_hidden_layers": 1, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, **fields}
    config = BertConfig(**sizes)
    model = AutoModel.from_config(config, attn_implementation="skein", add_pooling_layer=False).to(DEVICE)
    hf_skein.configure(model, **{**SMALL, "num_columns": 8, "num_strata": 2, "max_blocks": 2, **skein})
    return model


def batch(n):
    ids = torch.randint(3, 99, (2, n), device=DEVICE)
    mask = torch.arange(n, device=DEVICE) < torch.tensor([[n], [n - 3]], device=DEVICE)
    return {"input_ids": ids, "attention_mask": mask.long()}


def run(model, call, tokens):
    model.zero_grad()
    output = call(**tokens).last_hidden_state
    output.square().sum().backward()
    return [output.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)]


def test_a_compiled_model_is_one_graph_for_all_lengths():
    model = bert({"block_size": 16})
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    tokens = batch(20)
    for result, wanted in zip(run(model, compiled, tokens), run(model, model, tokens), strict=True):
        torch.testing.assert_close(result, wanted)
    with torch.compiler.set_stance("fail_on_recompile"):
        tokens = batch(35)
        results = run(model, compiled, tokens)
    for result, wanted in zip(results, run(model, model, tokens), strict=True):
        torch.testing.assert_close(result, wanted)


def test_checkpointing_autocast_and_functional_call():
    model = bert({"method": "skeinformer"}, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2).train()
    tokens = batch(25)
    torch.manual_seed(1)
    wanted = run(model, model, tokens)
    torch.manual_seed(1)
    parameters = dict(model.named_parameters())
    torch.testing.assert_close(functional_call(model, parameters, (), tokens).last_hidden_state, wanted[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    for result, expected in zip(run(model, model, tokens), wanted, strict=True):
        torch.testing.assert_close(result, expected)
    torch.manual_seed(1)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = run(model, model, tokens)[0]
    assert error(output, wanted[0]) < 0.1


# --- on a GPU ---


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


LARGE = {"min_length": 0, "backend": "triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("p", [64, 128])
@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_real_sizes_are_as_accurate_as_the_pytorch_path(gpu, dtype, method, p):
    query, key, value = (x.requires_grad_() for x in inputs(4096, batch=2, heads=8, kv_heads=4, p=p, dtype=dtype))
    mask = torch.arange(4096, device=DEVICE) < torch.tensor([[4096], [3001]], device=DEVICE)
    group = (key.repeat_interleave(2, 1).detach(), value.repeat_interleave(2, 1).detach())
    wanted = attention.exact_attention(*(x.float() for x in (query.detach(), *group)), mask, p**-0.5)
    wanted = wanted * mask[:, None, :, None]
    errors, grads = [], []
    for backend in ("torch", "triton"):
        config = SkeinConfig(**{**LARGE, "method": method, "backend": backend})
        output = skein_attention(query, key, value, mask, config=config)
        grads.append(torch.autograd.grad(output.float().square().sum(), (query, key, value)))
        errors.append(error(output, wanted))
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    for kernel, path in zip(grads[1], grads[0], strict=True):
        assert error(kernel, path) < 0.5 * max(errors) + 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["adaptive", "skeinformer"])
def test_runs_agree_bit_for_bit_and_memory_is_linear(gpu, method):
    config = SkeinConfig(**LARGE, method=method)
    peaks = []
    for n in (16384, 65536):
        single = [x.requires_grad_() for x in inputs(n, heads=4, kv_heads=4, p=64, dtype=torch.bfloat16)]
        results = []
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            output = skein_attention(*single, config=config)
            results.append([output, *torch.autograd.grad(output.float().sum(), single)])
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert peaks[1] < 5 * peaks[0]


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "n"), [("adaptive", 2048), ("adaptive", 100), ("skeinformer", 2048)])
def test_a_cuda_graph_captures_it(gpu, method, n):
    config = SkeinConfig(**LARGE, method=method)
    static = inputs(n, batch=2, heads=4, kv_heads=4, p=64, dtype=torch.bfloat16)
    mask = torch.ones(2, n, dtype=torch.bool, device=DEVICE)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            skein_attention(*static, mask, config=config)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = skein_attention(*static, mask, config=config)
        for x in static:
            x.normal_()
        mask[1, n // 2 :] = False
        graph.replay()
        assert torch.equal(output, skein_attention(*static, mask, config=config))


@pytest.mark.gpu
def test_another_device_than_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    query, key, value = (x.to("cuda:1").requires_grad_() for x in inputs(300, p=64))
    output = skein_attention(query, key, value, config=SkeinConfig(**SMALL))
    here = skein_attention(*(x.detach().to("cuda:0") for x in (query, key, value)), config=SkeinConfig(**SMALL))
    assert torch.equal(output.to("cuda:0"), here)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), (query, key, value)))


@pytest.mark.gpu
def test_auto_is_triton_and_addresses_go_beyond_32_bits(gpu):
    n, heads = 2**20, 34
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GB")
    one = torch.randn(1, n, 1, 64, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    with torch.no_grad():
        query = one.repeat(1, heads, 1, 1)  # more than 2**31 numbers
        assert attention._backend(SkeinConfig(), query, query) == "triton"
        output = skein_attention(query, query, query)
        assert torch.equal(output[:, 0], output[:, -1])
