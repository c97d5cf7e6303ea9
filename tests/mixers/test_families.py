import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssmtune.mixers import find_mixers, patch, unpatch
from ssmtune.mixers.selective_mixer import SelectiveMixer

MIXERS = {
    "falcon_mamba": ["backbone.layers.0.mixer", "backbone.layers.1.mixer"],
    "jamba": ["model.layers.0.mamba", "model.layers.1.mamba"],
    "zamba": ["model.layers.0.mamba", "model.layers.1.mamba_decoder.mamba", "model.layers.2.mamba_decoder.mamba"],
    "mamba2": ["backbone.layers.0.mixer", "backbone.layers.1.mixer"],
    "qwen3_next": ["model.layers.0.linear_attn", "model.layers.2.linear_attn"],
}
# Rounding to bfloat16 may send a token to another expert, which tells nothing about the mixers.
DENSE = {"jamba": {"num_experts": 1}}
PROJECTION_BIAS = {
    "falcon_mamba": {"use_bias": True},
    "mamba2": {"use_bias": True},
}
LORA_TARGETS = {
    "zamba": r".*mamba\.(in|out)_proj",
    "qwen3_next": r".*(in_proj_qkvz|in_proj_ba|out_proj)",
}
KINDS = ("initial_state", "state_offset", "output_offset", "conv_state")


@pytest.fixture(params=MIXERS)
def family(request):
    return request.param


def cache_name(model):
    return "cache_params" if hasattr(model, "backbone") else "past_key_values"


def logits_in_pieces(model, input_ids, sizes):
    cache, pieces = None, []
    for piece in input_ids.split(sizes, dim=1):
        output = model(piece, use_cache=True, **{cache_name(model): cache})
        cache = output[cache_name(model)]
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def loss_and_gradients(model, input_ids, **options):
    model.zero_grad()
    output = model(input_ids, labels=input_ids, **options)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def check_gradients(expected, actual, assert_close, ratio):
    assert expected.keys() == actual.keys()
    for name, grad in expected.items():
        # A token that is not in the batch, an expert that no token was sent to.
        assert (grad is None) is (actual[name] is None), name
        if grad is not None:
            assert_close(name, grad, actual[name].to(grad.dtype), ratio)


def padded(rows, side, seqlen):
    input_ids = torch.zeros(len(rows), seqlen, dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, slice(seqlen - len(row), seqlen) if side == "left" else slice(0, len(row))] = row
    return input_ids, (input_ids != 0).long()


@pytest.fixture
def rows(tokens):
    return [tokens(1, length)[0] for length in (1, 3, 9)]


def test_patch_finds_the_mixers_and_nothing_else(make_family, family):
    model = make_family(family)
    before = {name: (type(module), list(vars(module))) for name, module in model.named_modules()}
    assert list(patch(model).names) == MIXERS[family] == [name for name, _ in find_mixers(model)]
    for name, module in model.named_modules():
        assert isinstance(module, SelectiveMixer) is (name in MIXERS[family])
        assert isinstance(module, before[name][0])
    assert unpatch(model) == len(MIXERS[family])
    assert {name: (type(module), list(vars(module))) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_and_gradients_equal_transformers(make_pair, tokens, assert_close, family, training):
    theirs, ours = make_pair(family)
    expected, expected_grads = loss_and_gradients(theirs.train(training), tokens(2, 13))
    actual, actual_grads = loss_and_gradients(ours.train(training), tokens(2, 13))
    assert_close("logits", expected.logits, actual.logits, 1e-5)
    check_gradients(expected_grads, actual_grads, assert_close, 2e-5)


@pytest.mark.parametrize(
    "family, config",
    [
        ("falcon_mamba", {"use_bias": True, "mixer_rms_eps": 0.1}),
        ("falcon_mamba", {"use_conv_bias": False, "conv_kernel": 3}),
        ("jamba", {"mamba_proj_bias": True, "mamba_conv_bias": False}),
        ("jamba", {"mamba_d_conv": 2, "mamba_expand": 3, "rms_norm_eps": 0.1}),
        ("zamba", {"n_mamba_heads": 1}),
        ("zamba", {"n_mamba_heads": 4, "mamba_proj_bias": True, "mamba_d_conv": 2}),
        ("zamba", {"mamba_expand": 3, "mamba_conv_bias": False, "hidden_mamba_act": "gelu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_of_the_configuration(make_pair, tokens, assert_close, family, config):
    theirs, ours = make_pair(family, **config)
    expected, expected_grads = loss_and_gradients(theirs, tokens(2, 7))
    actual, actual_grads = loss_and_gradients(ours, tokens(2, 7))
    assert_close("logits", expected.logits, actual.logits, 1e-5)
    check_gradients(expected_grads, actual_grads, assert_close, 2e-5)


def test_bfloat16_is_no_further_from_float32_than_transformers(make_pair, tokens, family):
    theirs, ours = (model.to(torch.bfloat16) for model in make_pair(family, **DENSE.get(family, {})))
    with torch.no_grad():
        exact = copy.deepcopy(theirs).float()(tokens(4, 20)).logits
        their_error = (theirs(tokens(4, 20)).logits - exact).square().mean().sqrt()
        our_error = (ours(tokens(4, 20)).logits - exact).square().mean().sqrt()
    assert our_error <= 1.1 * their_error
    assert our_error <= 0.03 * exact.square().mean().sqrt()


def test_bfloat16_gradients_are_no_further_from_float32_than_those_of_transformers(
    make_pair, tokens, error_ratio, family
):
    # Of a short vector of norm weights rounding alone may change a fifth, so the mean over parameters is compared.
    theirs, ours = (model.to(torch.bfloat16) for model in make_pair(family, **DENSE.get(family, {})))
    _, exact = loss_and_gradients(copy.deepcopy(theirs).float(), tokens(2, 13))
    errors = []
    for model in (theirs, ours):
        _, gradients = loss_and_gradients(model, tokens(2, 13))
        assert {grad.dtype for grad in gradients.values()} == {torch.bfloat16}
        ratios = [error_ratio(exact[name], grad) for name, grad in gradients.items()]
        errors.append(sum(ratios) / len(ratios))
    print(f"mean error ratio: transformers {errors[0]:.4f}, ssmtune {errors[1]:.4f}")
    assert errors[1] <= 1.1 * errors[0]
    assert errors[1] <= 0.06


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 20}, {"num_beams": 3}], ids=["greedy", "sampling", "beams"]
)
def test_generation_with_and_without_a_cache(make_pair, adapt, tokens, family, options, adapted):
    theirs, ours = make_pair(family)
    if adapted:
        adapt(ours, *KINDS)

    def generate(model, prompt, **more):
        torch.manual_seed(1)
        return model.generate(tokens(2, prompt), max_new_tokens=6, **{"do_sample": False, **options}, **more)

    for prompt in (1, 2, 7):
        cached = generate(ours, prompt)
        assert torch.equal(cached, generate(ours, prompt, use_cache=False))
        if not adapted:
            assert torch.equal(cached, generate(theirs, prompt))


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_change_nothing(make_pair, adapt, rows, assert_close, family, side, adapted):
    theirs, ours = make_pair(family, **PROJECTION_BIAS.get(family, {"mamba_proj_bias": True}))
    if adapted:
        adapt(ours, *KINDS)
    input_ids, mask = padded(rows, side, 11)
    with torch.no_grad():
        logits = ours(input_ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            assert_close(f"row {i}", ours(row[None]).logits[0], logits[i][mask[i] == 1], 1e-5)
            if not adapted:
                assert_close(f"transformers {i}", theirs(row[None]).logits[0], logits[i][mask[i] == 1], 1e-5)


def test_gradients_ignore_pads(make_pair, adapt, rows, assert_close, family):
    _, ours = make_pair(family, **PROJECTION_BIAS.get(family, {"mamba_proj_bias": True}))
    adapt(ours, *KINDS)
    input_ids, mask = padded(rows, "left", 11)
    (ours(input_ids, attention_mask=mask).logits.square() * mask[..., None]).sum().backward()
    actual = {name: parameter.grad for name, parameter in ours.named_parameters()}
    ours.zero_grad(set_to_none=True)
    for row in rows:
        ours(row[None]).logits.square().sum().backward()
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            assert_close(name, parameter.grad, actual[name], 2e-5)


def test_generation_from_left_padded_prompts(make_pair, adapt, rows, family):
    _, ours = make_pair(family, **PROJECTION_BIAS.get(family, {"mamba_proj_bias": True}))
    adapt(ours, *KINDS)
    input_ids, mask = padded(rows, "left", 9)
    together = ours.generate(input_ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 9:]
    for i, row in enumerate(rows):
        assert torch.equal(ours.generate(row[None], max_new_tokens=6, do_sample=False)[0, len(row) :], together[i])


def test_generation_from_right_padded_prompts_with_and_without_a_cache(make_pair, adapt, rows, family):
    # New tokens come after the pads, which take a place in the convolution: not what a row alone would give.
    _, ours = make_pair(family, **PROJECTION_BIAS.get(family, {"mamba_proj_bias": True}))
    adapt(ours, *KINDS)
    input_ids, mask = padded(rows, "right", 9)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(input_ids, **options), ours.generate(input_ids, **options, use_cache=False))


def test_a_right_padded_prefix_leaves_the_state_of_its_tokens(make_pair, rows, assert_close, family):
    _, ours = make_pair(family)
    input_ids, mask = padded(rows, "right", 11)
    with torch.no_grad():
        together = ours(input_ids, attention_mask=mask, use_cache=True)[cache_name(ours)]
        for i, row in enumerate(rows):
            alone = ours(row[None], use_cache=True)[cache_name(ours)]
            for _, mixer in find_mixers(ours):
                expected, actual = (cache.layers[mixer.layer_idx].recurrent_states[0] for cache in (alone, together))
                assert_close("state", expected[0], actual[i], 1e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_a_sequence_in_pieces_equals_the_whole(make_pair, adapt, tokens, assert_close, family, grad, adapted):
    theirs, ours = make_pair(family)
    if adapted:
        adapt(ours, *KINDS)
    with torch.set_grad_enabled(grad):
        whole = ours(tokens(2, 12)).logits
        for sizes in ([5, 7], [1, 1, 1, 9], [2, 2, 8], [11, 1], [1] * 12):
            assert_close(str(sizes), whole, logits_in_pieces(ours, tokens(2, 12), sizes), 1e-5)
        if not adapted:
            assert_close("transformers", theirs(tokens(2, 12)).logits, whole, 1e-5)


def test_continues_a_cache_that_transformers_filled(make_pair, tokens, assert_close, family):
    theirs, ours = make_pair(family)
    with torch.no_grad():
        whole = theirs(tokens(2, 12)).logits
        for first, second, size in ((theirs, ours, 5), (theirs, ours, 1), (ours, theirs, 1)):
            cache = first(tokens(2, 12)[:, : 12 - size], use_cache=True)[cache_name(first)]
            output = second(tokens(2, 12)[:, 12 - size :], use_cache=True, **{cache_name(second): cache})
            assert_close("logits", whole[:, 12 - size :], output.logits, 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(make_pair, adapt, tokens, family, use_reentrant):
    _, ours = make_pair(family)
    adapt(ours, "initial_state", "state_offset")
    _, expected = loss_and_gradients(ours.train(), tokens(2, 6))
    expected = {name: None if grad is None else grad.clone() for name, grad in expected.items()}
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    _, actual = loss_and_gradients(ours, tokens(2, 6))
    for name, grad in expected.items():
        assert grad is None or torch.equal(grad, actual[name]), name


def test_compile_fullgraph(make_pair, adapt, tokens, assert_close, family):
    torch._dynamo.reset()
    _, ours = make_pair(family, **DENSE.get(family, {}))
    adapt(ours, *KINDS)
    mixer = find_mixers(ours)[0][1]
    hidden = torch.randn(2, 6, 32)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (mixer, compiled):
        mixer.zero_grad()
        out = run(hidden, attention_mask=mask)
        out.square().sum().backward()
        gradients.append((out, {name: parameter.grad.clone() for name, parameter in mixer.named_parameters()}))
    assert_close("out", gradients[0][0], gradients[1][0], 1e-5)
    check_gradients(gradients[0][1], gradients[1][1], assert_close, 1e-5)


def test_compile_the_model_fullgraph(make_pair, tokens, assert_close, family):
    torch._dynamo.reset()
    # The experts of transformers look at which of them have tokens, which breaks a graph.
    _, ours = make_pair(family, **DENSE.get(family, {}))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = ours(tokens(2, 6), use_cache=False).logits
        assert_close("logits", expected, compiled(tokens(2, 6), use_cache=False).logits, 1e-5)


def test_copies_and_checkpoints(make_pair, tokens, family, tmp_path):
    theirs, ours = make_pair(family)
    expected = ours(tokens(2, 6)).logits
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert [type(mixer) for _, mixer in find_mixers(twin)] == [type(mixer) for _, mixer in find_mixers(ours)]
        assert torch.equal(twin(tokens(2, 6)).logits, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map(make_pair, tokens, assert_close, family, device_map, tmp_path):
    pytest.importorskip("accelerate")
    theirs, _ = make_pair(family)
    theirs.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert list(patch(loaded).names) == MIXERS[family]
    device = next(loaded.parameters()).device
    expected = theirs(tokens(2, 6)).logits
    assert_close("logits", expected, loaded(tokens(2, 6).to(device)).logits.to(expected.device), 1e-5)


def test_weights_offloaded_with_accelerate(make_pair, tokens, assert_close, family):
    accelerate = pytest.importorskip("accelerate")
    theirs, ours = make_pair(family)
    accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
    assert find_mixers(ours)[0][1].A_log.is_meta
    with torch.no_grad():
        assert_close("logits", theirs(tokens(2, 6)).logits, ours(tokens(2, 6)).logits, 1e-5)


def test_training_lowers_the_loss_as_it_does_in_transformers(make_pair, tokens, family):
    losses = []
    for model in make_pair(family):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        losses.append([])
        for _ in range(4):
            output, _ = loss_and_gradients(model, tokens(2, 9))
            optimizer.step()
            losses[-1].append(output.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1][-1] < losses[1][0]


def test_lora_trains_every_tensor(make_family, tokens, assert_close, family):
    peft = pytest.importorskip("peft")
    targets = LORA_TARGETS.get(family, r".*(mixer|mamba)\.(in|x|dt)_proj")
    model = make_family(family)
    base = model(tokens(2, 9)).logits
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert len(patch(model).names) == len(MIXERS[family])
    logits = model(tokens(2, 9)).logits
    assert (logits - base).abs().max() > 0.01
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.any(), name
    with torch.no_grad():
        assert_close("merged", logits, model.merge_and_unload()(tokens(2, 9)).logits, 1e-5)


@pytest.mark.parametrize("method", ["StateOffsetConfig", "InitialStateConfig"])
@pytest.mark.parametrize("rank", [None, 2])
def test_tuners(make_family, tokens, assert_close, family, method, rank, tmp_path):
    peft = pytest.importorskip("peft")
    ssmtune = pytest.importorskip("ssmtune")
    config = getattr(ssmtune, method)(rank=rank, init_weights=False, task_type="CAUSAL_LM")
    base = make_family(family)
    base_logits = base(tokens(2, 9)).logits
    model = peft.get_peft_model(base, config)
    logits = model(tokens(2, 9)).logits
    assert (logits - base_logits).abs().max() > 0.01
    logits.square().sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(MIXERS[family]) * (1 if rank is None else 2)
    for name, parameter in trained.items():
        assert parameter.grad.any(), name
    options = {"input_ids": tokens(2, 5), "max_new_tokens": 6, "do_sample": False}
    generated = model.generate(**options)
    assert torch.equal(generated, model.generate(**options, use_cache=False))
    with model.disable_adapter():
        assert_close("disabled", base_logits, model(tokens(2, 9)).logits, 1e-5)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_family(family), tmp_path)
    assert torch.equal(loaded(tokens(2, 9)).logits, logits)
