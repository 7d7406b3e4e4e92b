"""The forms of attention against each other and against PyTorch; which one computes where."""

import functools
import importlib.util
import re
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import small_torch
import torch
from jax._src.cudnn import fused_attention_stablehlo

from flax_asr import criterion, errors, plan
from flax_asr.data import buckets
from flax_asr.estimate import chips
from flax_asr.models import attention, convert, short_attention, transformer, wav2vec2

# heads, channels of a head, frames, queries that the kernel takes at once
SIZES = [
    (2, 64, 48, 512),  # two heads fill the lanes; one block of queries
    (4, 64, 40, 16),  # two blocks of heads; the last block of queries is cut
    (8, 80, 24, 16),  # heads across the borders of lane tiles, as in XLS-R 1B
    (3, 12, 21, 8),  # fewer channels than lanes
]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def arrays(heads, head, frames, dtype=np.float32, batch=3):
    """Products for query, key, value; their biases; the gradient of the output; lengths: all
    frames, half of them, one."""
    rng = np.random.default_rng(frames)
    shape = (batch, frames, heads * head)
    *products, upstream = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    biases = [jnp.asarray(rng.normal(size=shape[-1]), jnp.float32) for _ in range(3)]
    return [*products, *biases, upstream], np.array([frames, frames // 2, 1])


def kernel(lengths, heads, *dropout):
    """`attend` with its arguments in a row."""
    lengths = jnp.asarray(lengths)
    return lambda *six: short_attention.attend(six[:3], six[3:], lengths, heads, *dropout)


def plain(lengths, heads, form=attention.plain, dropout=()):
    """Another form with the same arguments."""

    def attend(*six):
        query, key, value = (x + b.astype(x.dtype) for x, b in zip(six[:3], six[3:], strict=True))
        mask = None
        if lengths is not None:
            mask = jnp.arange(query.shape[1]) < jnp.asarray(lengths)[:, None]
        scale = jnp.asarray((query.shape[-1] // heads) ** -0.5, query.dtype)
        mixed = form(query * scale, key, value, mask, heads, *dropout)
        return mixed[0] if isinstance(mixed, tuple) else mixed

    return attend


def with_gradients(form, operands):
    """The result, and the gradients of products and biases."""
    *inputs, upstream = operands
    result, pull_back = jax.vjp(form, *inputs)
    return [result, *pull_back(upstream)]


def close(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        # the gradient of the keys' biases is zero but for rounding
        assert np.abs(mine - other).max() <= tolerance * max(np.abs(other).max(), 1.0)


@pytest.mark.parametrize(("heads", "head", "frames", "queries"), SIZES)
def test_the_kernel_equals_the_plain_form_and_pytorchs(heads, head, frames, queries, monkeypatch):
    monkeypatch.setattr(short_attention, "QUERIES", queries)
    operands, lengths = arrays(heads, head, frames)
    forms = (kernel(lengths, heads), plain(lengths, heads))
    both = jax.jit(lambda *operands: [with_gradients(form, operands) for form in forms])
    ours, theirs = both(*operands)
    close(ours, theirs, 2e-5)

    inputs = [torch.tensor(np.asarray(x)).requires_grad_() for x in operands[:-1]]
    mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
    mixed = torch.nn.functional.scaled_dot_product_attention(
        *(
            (x + b).view(3, frames, heads, head).transpose(1, 2)
            for x, b in zip(inputs[:3], inputs[3:], strict=True)
        ),
        attn_mask=mask[:, None, None],
    )
    mixed = mixed.transpose(1, 2).reshape(3, frames, -1)
    mixed.backward(torch.tensor(np.asarray(operands[-1])))
    close(ours, [mixed.detach(), *(x.grad for x in inputs)], 2e-5)


@pytest.mark.parametrize(
    ("heads", "head", "frames", "queries", "rate"),
    [*((*size, 0.3) for size in SIZES), (*SIZES[-1], 1.0)],
)
def test_the_kernel_drops_the_weights_that_the_plain_form_drops(
    heads, head, frames, queries, rate, monkeypatch
):
    monkeypatch.setattr(short_attention, "QUERIES", queries)
    operands, lengths = arrays(heads, head, frames)
    words = jnp.array([7, 0xF0000001], jnp.uint32)
    forms = (
        kernel(lengths, heads, words, rate),
        plain(lengths, heads, dropout=(words, rate)),
    )
    both = jax.jit(lambda *operands: [with_gradients(form, operands) for form in forms])
    ours, theirs = both(*operands)
    close(ours, theirs, 2e-5)
    quiet = kernel(lengths, heads)(*operands[:-1])
    assert np.abs(ours[0] - quiet).max() > 0.1


@pytest.mark.parametrize("form", ["kernel", "recomputed"])
def test_in_bfloat16_each_form_is_as_near_the_truth_as_the_plain_one(form):
    heads, frames = 2, 48
    operands, lengths = arrays(heads, 64, frames, jnp.bfloat16)
    found = {
        "kernel": kernel(lengths, heads),
        "recomputed": plain(lengths, heads, attention.recomputed),
    }
    forms = (found[form], plain(lengths, heads))
    ours, rounded = (with_gradients(form, operands) for form in forms)
    truth = with_gradients(forms[1], [x.astype(jnp.float32) for x in operands])
    for mine, other, exact in zip(ours, rounded, truth, strict=True):
        assert mine.dtype == other.dtype
        error, allowed = (np.abs(np.asarray(x, np.float32) - exact).max() for x in (mine, other))
        assert error <= 1.2 * allowed


def test_a_clip_without_frames_attends_to_all_alike_and_padding_gets_no_gradient():
    operands, _ = arrays(2, 64, 16)
    results = with_gradients(kernel([0, 5, 16], 2), operands)
    assert all(np.isfinite(x).all() for x in results)
    mixed, _, key, value, *_ = results
    everything = (operands[2][0] + operands[5]).mean(axis=0)
    np.testing.assert_allclose(mixed[0], jnp.broadcast_to(everything, (16, 128)), atol=1e-6)
    for gradient in (key, value):
        assert np.abs(gradient[1, :5]).max() > 0.1
        assert np.abs(gradient[1, 5:]).max() == 0
    assert np.abs(key[0]).max() == 0


@pytest.mark.parametrize("lengths", [None, [64, 32, 0]])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_recomputed_form_equals_the_plain_form_and_keeps_no_weights(rate, lengths):
    operands, _ = arrays(4, 8, 64)
    dropout = (jnp.array([3, 5], jnp.uint32), rate) if rate else ()
    forms = [plain(lengths, 4, form, dropout) for form in (attention.recomputed, attention.plain)]
    ours, theirs = (with_gradients(form, operands) for form in forms)
    close(ours, theirs, 2e-5)
    kept, kept_by_plain = (
        max(leaf.size for leaf in jax.tree.leaves(jax.vjp(form, *operands[:-1])[1]))
        for form in forms
    )
    assert kept == 3 * 64 * 32  # clips, frames, channels
    assert kept_by_plain == 3 * 4 * 64 * 64  # clips, heads, frames, frames


def test_xla_sees_no_weights_of_the_forward_pass_in_the_backward_pass_of_the_recomputed_form():
    operands, lengths = arrays(4, 8, 64)
    form = plain(lengths, 4, attention.recomputed)
    text = jax.jit(functools.partial(with_gradients, form)).lower(operands).as_text()
    barriers = [line for line in text.splitlines() if "optimization_barrier" in line]
    frames = "tensor<3x64x32xf32>"
    assert any(line.count(frames) >= 3 for line in barriers), barriers


@pytest.mark.parametrize("frames", [20, 21])
def test_the_form_that_calls_cudnn_equals_the_plain_form(frames):
    operands, lengths = arrays(4, 8, frames)
    called = functools.partial(attention.cudnn, implementation="xla")
    ours = with_gradients(plain(lengths, 4, called), operands)
    close(ours, with_gradients(plain(lengths, 4), operands), 2e-5)


@pytest.mark.parametrize("frames", [20, 21])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_jax_takes_gradients_to_cudnn_for_any_number_of_frames(frames, dtype, monkeypatch):
    """Lowered for CUDA, where JAX checks shapes and types; only the library is not asked for."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 9_10_00)
    operands, lengths = arrays(2, 64, frames, dtype)
    attend = plain(lengths, 2, attention.cudnn)
    gradients = jax.jit(functools.partial(with_gradients, attend)).trace(operands)
    text = gradients.lower(lowering_platforms=("cuda",)).as_text()
    for call in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert f"custom_call @{call}(" in text


# In the model


def model(**changes):
    config = small_torch.config(**changes)
    for rate in ("hidden_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"):
        setattr(config, rate, 0.0)
    built = small_torch.model("Wav2Vec2ForCTC", config)
    params = convert.params_from_torch(small_torch.tensors(built), config, head=True)
    samples = np.arange(1200)
    values = np.random.default_rng(0).normal(size=(2, 1200)).astype(np.float32)
    mask = samples < np.array([[1200], [777]])
    return built, wav2vec2.Wav2Vec2ForCTCModule(config), params, values * mask, mask


@pytest.mark.parametrize("padded", [True, False])
def test_the_model_with_the_kernel_gives_pytorchs_logits_and_the_plain_gradients(padded):
    built, module, params, values, mask = model()
    mask = mask if padded else None
    frames = int(wav2vec2.frame_lengths(module.config, 1200))
    assert frames % transformer.ROW_MULTIPLE  # frames are padded for the kernel, and cut again
    with torch.no_grad():
        theirs = built(
            torch.tensor(values),
            attention_mask=None if mask is None else torch.tensor(mask).long(),
        ).logits
    real = np.ones((2, frames), bool)
    if padded:
        real = np.arange(frames) < wav2vec2.frame_lengths(module.config, mask.sum(-1))[:, None]
    weights = np.random.default_rng(1).normal(size=theirs.shape) * real[..., None]

    @jax.jit
    def both(params):
        def loss(params, kind):
            logits = module.clone(attention=kind).apply({"params": params}, values, mask).logits
            return (jax.nn.log_softmax(logits) * weights).sum(), logits

        return [jax.grad(loss, has_aux=True)(params, kind) for kind in ("pallas", "xla")]

    (ours, logits), (plain, _) = both(params)
    np.testing.assert_allclose(logits[real], theirs.numpy()[real], atol=1e-4, rtol=0)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, atol=1e-4 * np.abs(b).max() + 1e-6 * largest, rtol=0
        ),
        ours,
        plain,
    )


def test_a_gpus_model_drops_the_same_attention_weights():
    _, module, params, values, mask = model(attention_dropout=0.3)

    @functools.partial(jax.jit, static_argnums=1)
    def learn(params, platform):
        form = module.clone(platform=platform)

        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            variables = {"params": params}
            logits = form.apply(variables, values, mask, deterministic=False, rngs=rngs).logits
            return (logits[0] ** 2).sum()

        return jax.value_and_grad(loss)(params)

    (loss, ours), (expected, theirs) = (learn(params, platform) for platform in ("gpu", "cpu"))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * largest, rtol=1e-4), ours, theirs
    )


def test_training_leaves_frames_of_padding_and_learns_the_same():
    quiet = {"final_dropout": 0.0, "attention_dropout": 0.0, "apply_spec_augment": False}
    _, module, params, values, mask = model(**quiet)
    labels, counts = jnp.array([[3, 4, 4], [5, 0, 0]]), jnp.array([3, 1])
    audio = jnp.asarray(values * 3000, jnp.int16)
    ones = jnp.ones(2)
    batch = criterion.Batch(audio, ones / 3000, jnp.asarray(mask.sum(-1)), labels, counts, ones)

    @functools.partial(jax.jit, static_argnums=1)
    def learn(params, kind):
        objective = criterion.Objective(module.clone(attention=kind), module.config)

        def loss(params):
            losses, logits, _ = criterion.forward(objective, params, batch, jax.random.key(0))
            return losses.sum(), (losses, logits.shape[1])

        return jax.grad(loss, has_aux=True)(params)

    (ours, (losses, padded)), (plain, (expected, frames)) = (
        learn(params, kind) for kind in ("pallas", "xla")
    )
    assert padded > frames
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=1e-3),
        ours,
        plain,
    )


def test_frames_of_padding_are_left_where_that_is_asked_for():
    _, module, params, values, mask = model()

    def logits(kind, **options):
        form = module.clone(attention=kind)
        return form.apply({"params": params}, values, mask, **options).logits

    cut, left = logits("pallas"), logits("pallas", keep_padding=True)
    assert cut.shape[1] < left.shape[1]
    assert left.shape[1] % transformer.ROW_MULTIPLE == 0
    np.testing.assert_allclose(left[:, : cut.shape[1]], cut, atol=1e-6)
    assert logits("xla", keep_padding=True).shape == cut.shape


def with_dropout(module, params, values, mask, **options):
    return module.apply(
        {"params": params}, values, mask, rngs={"dropout": jax.random.key(0)}, **options
    )


def test_the_plain_form_computes_where_the_weights_are_wanted():
    _, module, params, values, mask = model(attention_dropout=0.3)
    kernel = module.clone(attention="pallas")
    ours, plain = (
        with_dropout(m, params, values, mask, output_attentions=True) for m in (kernel, module)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, plain)
    assert len(ours.attentions) == 2


def test_the_model_with_the_kernel_drops_attention_weights_in_training_only():
    _, module, params, values, mask = model(attention_dropout=0.3)
    kernel = module.clone(attention="pallas")
    busy = with_dropout(kernel, params, values, mask, deterministic=False).logits
    assert np.abs(busy - with_dropout(kernel, params, values, mask).logits).max() > 1e-3
    # 1200 samples and more make whole tiles of frames, so that both forms see equal places
    samples = buckets.smallest_samples(16, module.config.conv_kernel, module.config.conv_stride)
    values = np.random.default_rng(0).normal(size=(2, samples)).astype(np.float32)
    mask = np.arange(samples) < np.array([[samples], [samples // 2]])
    ours, plain = (
        with_dropout(m, params, values, mask, deterministic=False).logits for m in (kernel, module)
    )
    frames = wav2vec2.frame_lengths(module.config, mask.sum(-1))
    real = np.arange(ours.shape[1]) < frames[:, None]
    np.testing.assert_allclose(ours[real], plain[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", [64, 80])
def test_what_is_compiled_for_tpu_by_default_has_the_kernel_of_every_layer(head):
    config = small_torch.config(hidden_size=8 * head, num_attention_heads=8)
    config.num_conv_pos_embedding_groups = 8
    module = wav2vec2.Wav2Vec2ForCTCModule(config, dtype=jnp.bfloat16, platform="tpu")
    values = jax.ShapeDtypeStruct((2, 1200), jnp.float32)
    params = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), values)

    def loss(params, values):
        return module.apply(params, values).logits.sum()

    def text(platform):
        # The order in memory that positional.py asks for is in no format that jax keeps for long.
        unchecked = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")
        gradient = jax.jit(jax.grad(loss))
        exported = jax.export.export(gradient, platforms=[platform], disabled_checks=[unchecked])
        return exported(params, values).mlir_module()

    assert _kernels(text("tpu")) == 2 * config.num_hidden_layers
    assert _kernels(text("cpu")) == 0


def _kernels(text: str) -> int:
    """How many kernels a program runs; layers call the same function, which stands there once."""
    functions = dict(re.findall(r"func\.func \w+ @(\w+)(.*?)(?=func\.func |\Z)", text, re.DOTALL))

    def within(name):
        own = functions[name].count("custom_call @tpu_custom_call")
        return own + sum(map(within, re.findall(r" call @(\w+)\(", functions[name])))

    return within("main")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("topology", "heads", "hidden", "frames", "dtype", "rate"),
    [
        ("v5e:1x1", 16, 1024, 504, jnp.bfloat16, 0.0),
        ("v5e:1x1", 16, 1024, 2048, jnp.bfloat16, 0.1),
        ("v5e:1x1", 16, 1024, 1008, jnp.float32, 0.0),
        ("v5e:1x1", 16, 1280, 2048, jnp.bfloat16, 0.1),
        ("v5e:1x1", 16, 1280, 1024, jnp.float32, 0.1),
        ("v5e:1x1", 12, 768, 1024, jnp.float32, 0.1),
        ("v4:2x2x1", 16, 1024, 2048, jnp.bfloat16, 0.1),
        ("v4:2x2x1", 16, 1024, 1008, jnp.float32, 0.0),
        ("v5p:2x2x1", 16, 1280, 2048, jnp.bfloat16, 0.1),
        ("v6e:2x4", 16, 1280, 1024, jnp.float32, 0.1),
    ],
)
def test_the_real_tpu_compiler_has_room_for_long_clips(
    topology, heads, hidden, frames, dtype, rate
):
    device = plan.describe(chips.parse(topology)).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shape(size, dtype):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    def gradients(products, biases, lengths, words, upstream):
        def attend(*three):
            dropout = (words, rate) if rate else ()
            return short_attention.attend(three, biases, lengths, heads, *dropout)

        return jax.vjp(attend, *products)[1](upstream)

    array = shape((2, frames, hidden), dtype)
    scalars = (shape((2,), jnp.int32), shape((2,), jnp.uint32))
    biases = (shape((hidden,), jnp.float32),) * 3
    traced = jax.jit(gradients).trace((array,) * 3, biases, *scalars, array)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).compile().as_text()


# Which form computes


def chosen(
    kind="auto",
    platform="tpu",
    dtype=jnp.bfloat16,
    frames=499,
    deterministic=True,
    keep_weights=False,
    remat_policy="none",
    **options,
):
    config = small_torch.config(
        **{"hidden_size": 128, "num_attention_heads": 2, "attention_dropout": 0.1, **options}
    )
    return attention.choose(
        kind,
        platform,
        config,
        dtype,
        frames,
        deterministic=deterministic,
        keep_weights=keep_weights,
        remat_policy=remat_policy,
    )


def test_auto_takes_the_quickest_form_that_is_right():
    assert chosen() == "pallas"
    assert chosen(dtype=jnp.float32) == "pallas"
    assert chosen(dtype=jnp.float16) == "xla"
    assert chosen(frames=2048) == "pallas"
    assert chosen(frames=2049) == "xla"
    assert chosen(frames=1024, dtype=jnp.float32) == "pallas"
    assert chosen(frames=1025, dtype=jnp.float32) == "xla"
    assert chosen(platform="cpu") == "xla"
    assert chosen(platform="gpu") == "cudnn"
    assert chosen(platform="cuda", dtype=jnp.float32) == "recomputed"
    assert chosen(platform="rocm") == "recomputed"
    assert chosen(platform="gpu", num_attention_heads=32) == "recomputed"
    assert chosen("xla") == "xla"
    assert chosen("xla", platform="gpu") == "recomputed"
    assert chosen(keep_weights=True) == "xla"


def test_a_gpu_keeps_weights_that_are_asked_for_and_what_a_policy_keeps():
    assert chosen("xla", platform="gpu", keep_weights=True) == "xla"
    assert chosen("xla", platform="gpu", remat_policy="full") == "xla"


@pytest.mark.parametrize(
    ("capability", "form"),
    [("7.5", "recomputed"), ("9.0", "cudnn"), ("12.1", "cudnn"), ("gfx942", "recomputed")],
)
def test_a_gpu_that_cudnns_kernel_does_not_know_computes_the_plain_form(
    capability, form, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    gpu = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [gpu])
    assert chosen(platform="gpu") == form


@pytest.mark.parametrize("named", [True, False])
def test_a_model_on_the_cpu_of_a_machine_with_a_gpu_computes_there(named, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, module, params, values, mask = model()
    cpu = "cpu" if named else jax.devices("cpu")[0]
    with jax.default_device(cpu):
        logits = module.clone(dtype=jnp.bfloat16).apply({"params": params}, values, mask).logits
    assert np.isfinite(logits).all()


def test_dropout_of_the_weights_is_in_the_kernel_and_not_in_cudnns():
    for kind in ("auto", "pallas"):
        assert chosen(kind, deterministic=False) == "pallas"
    for kind in ("auto", "cudnn"):
        assert chosen(kind, platform="gpu", deterministic=False) == "recomputed"
        assert chosen(kind, platform="gpu", deterministic=False, attention_dropout=0.0) == "cudnn"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "flash"}, "not one of auto, xla, pallas, cudnn"),
        ({"kind": "pallas", "platform": "gpu"}, "runs on TPU"),
        ({"kind": "pallas", "dtype": jnp.float16}, "not in float16"),
        ({"kind": "pallas", "frames": 5000}, "not 5000"),
        ({"kind": "cudnn"}, "not on tpu"),
        ({"kind": "cudnn", "platform": "gpu", "dtype": jnp.float32}, "not in float32"),
        ({"kind": "cudnn", "platform": "gpu", "num_attention_heads": 32}, "not of 4"),
    ],
)
def test_a_form_that_cannot_compute_is_refused_with_the_reason(options, words):
    with pytest.raises(errors.ModelError, match=words):
        chosen(**options)
