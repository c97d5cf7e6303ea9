"""Mixers and models of mamba_ssm itself, on its paths in plain PyTorch.

The package has to be installed, or SSMTUNE_MAMBA_SSM has to name the folder of its source, unpacked (`pip download
mamba-ssm --no-deps --no-binary :all:` with MAMBA_SKIP_CUDA_BUILD=TRUE gets it); it needs einops.
"""

import copy
import importlib.util
import os
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import ssmtune
from ssmtune.mixers import find_mixers, mamba, mamba2  # noqa: F401 - before mamba_ssm, which transformers would use
from ssmtune.tuners import InitialStateConfig, StateOffsetConfig

SIZES = {"d_model": 32, "d_state": 8, "layer_idx": 0}
HEADS = SIZES | {"headdim": 8, "chunk_size": 4, "use_mem_eff_path": False}
MIXERS = {
    "mamba": ("Mamba", SIZES),
    "mamba-bias": ("Mamba", SIZES | {"bias": True, "conv_bias": False}),
    "mamba2": ("Mamba2", HEADS),
    "mamba2-groups": ("Mamba2", HEADS | {"ngroups": 2, "D_has_hdim": True}),
    "mamba2-gate-last": ("Mamba2", HEADS | {"norm_before_gate": True, "bias": True}),
    "mamba2-no-norm": ("Mamba2", HEADS | {"rmsnorm": False, "dt_limit": (0.01, 0.5)}),
    "mamba2-mlp": ("Mamba2", HEADS | {"d_ssm": 48}),
}
MODELS = {"Mamba1": {"d_state": 8}, "Mamba2": {"d_state": 8, "headdim": 8, "chunk_size": 4, "use_mem_eff_path": False}}
CONFIGS = {"h": StateOffsetConfig, "y": partial(StateOffsetConfig, target="y"), "initial": InitialStateConfig}


@pytest.fixture(scope="module")
def package():
    """mamba_ssm, forgotten again afterwards."""
    source = os.environ.get("SSMTUNE_MAMBA_SSM")
    missing = [name for name in ("einops", "triton") if importlib.util.find_spec(name) is None]
    if missing or not (source or importlib.util.find_spec("mamba_ssm")):
        pytest.skip(f"needs {missing[0]}" if missing else "no mamba_ssm: SSMTUNE_MAMBA_SSM names no source of it")
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        if source:
            patch.syspath_prepend(source)
            # The compiled part, which is not called here.
            patch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
        import mamba_ssm

        yield mamba_ssm
    for name in set(sys.modules) - before:
        if "mamba_ssm" in name:
            del sys.modules[name]


@pytest.fixture
def plain(package, monkeypatch):
    """mamba_ssm with what it has in PyTorch in the place of its kernels."""
    from mamba_ssm.models import mixer_seq_simple
    from mamba_ssm.modules import mamba2 as heads
    from mamba_ssm.modules import mamba_simple
    from mamba_ssm.ops import selective_scan_interface
    from mamba_ssm.ops.triton import layernorm_gated, ssd_combined

    def scan(*args, chunk_size, seq_idx, cu_seqlens, return_final_states, return_varlen_states, **kwargs):
        return ssd_combined.ssd_selective_scan(*args, **kwargs)

    def norm(self, x, z=None):
        kwargs = {"group_size": self.group_size, "norm_before_gate": self.norm_before_gate}
        return layernorm_gated.rms_norm_ref(x, self.weight, self.bias, z, self.eps, **kwargs)

    for module in (mamba_simple, selective_scan_interface):
        monkeypatch.setattr(module, "selective_scan_fn", selective_scan_interface.selective_scan_ref)
    for module in (mamba_simple, heads):
        for name in ("selective_state_update", "causal_conv1d_fn", "causal_conv1d_update"):
            monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(heads, "mamba_chunk_scan_combined", scan)
    monkeypatch.setattr(layernorm_gated.RMSNorm, "forward", norm)
    monkeypatch.setattr(mixer_seq_simple, "RMSNorm", nn.RMSNorm)
    return package


def randomised(module):
    for name, parameter in module.named_parameters():
        if not name.endswith(("embedding.weight", "lm_head.weight")):
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture
def make_mixers(plain):
    """A factory of two equal mixers, mamba_ssm's own and a patched one."""

    def make(name):
        kind, sizes = MIXERS[name]
        theirs = randomised(getattr(plain, kind)(**sizes))
        ours = copy.deepcopy(theirs)
        ssmtune.patch(ours)
        return theirs, ours

    return make


@pytest.fixture
def make_model(plain):
    def make(layer="Mamba1"):
        from mamba_ssm.models.config_mamba import MambaConfig

        settings = {"layer": layer} | MODELS[layer]
        config = MambaConfig(d_model=32, n_layer=2, vocab_size=60, ssm_cfg=settings, fused_add_norm=False)
        return randomised(plain.MambaLMHeadModel(config))

    return make


def inference_params(offset=0):
    return SimpleNamespace(seqlen_offset=offset, key_value_memory_dict={}, max_seqlen=64)


def in_pieces(run, x, sizes):
    params, outputs = inference_params(), []
    for piece in x.split(sizes, dim=1):
        outputs.append(run(piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", MIXERS)
def test_a_patched_mixer_computes_what_it_did(make_mixers, assert_close, name):
    theirs, ours = make_mixers(name)
    x = torch.randn(2, 9, 32)
    grads = {}
    for mixer in (theirs, ours):
        inputs = x.clone().requires_grad_(True)
        out = mixer(inputs)
        out.square().sum().backward()
        grads[mixer] = {"out": out, "input": inputs.grad} | {name: p.grad for name, p in mixer.named_parameters()}
    for tensor, expected in grads[theirs].items():
        assert_close(tensor, expected, grads[ours][tensor], 2e-5)


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "mamba2-groups"])
def test_steps_of_both_go_on_from_states_of_each_other(make_mixers, assert_close, name):
    theirs, ours = make_mixers(name)
    if name == "mamba2-no-norm":
        # Its own step does not know the limits.
        theirs.dt_limit = ours.dt_limit = (0.0, float("inf"))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        states = theirs.allocate_inference_cache(2, 5)
        outputs = [(theirs, ours)[i % 2].step(x[:, i : i + 1], *states)[0] for i in range(5)]
        assert_close("out", ours(x), torch.cat(outputs, dim=1), 1e-5)


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 1, 3, 1]], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_pieces_of_a_sequence_with_a_cache_give_the_whole(make_mixers, assert_close, name, sizes):
    _, ours = make_mixers(name)
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        assert_close("out", ours(x), in_pieces(ours, x, sizes), 1e-5)


def test_a_cache_is_written_in_place_and_in_float32(make_mixers):
    for name in ("mamba", "mamba2"):
        _, ours = make_mixers(name)
        ours, params, x = ours.bfloat16(), inference_params(), torch.randn(2, 4, 32).bfloat16()
        with torch.no_grad():
            ours(x, inference_params=params)
            (before,) = params.key_value_memory_dict.values()
            kept = [state.clone() for state in before]
            params.seqlen_offset = 4
            ours(x[:, :1], inference_params=params)
        (after,) = params.key_value_memory_dict.values()
        assert all(a is b for a, b in zip(after, before, strict=True)) and after[1].dtype == torch.float32
        assert not any(torch.equal(a, b) for a, b in zip(after, kept, strict=True))


def test_a_cache_from_inference_mode_can_be_continued_outside_of_it(make_mixers, assert_close):
    _, ours = make_mixers("mamba")
    x, params = torch.randn(2, 6, 32), inference_params()
    with torch.inference_mode():
        ours(x[:, :4], inference_params=params)
    params.seqlen_offset = 4
    with torch.no_grad():
        first = ours(x[:, 4:5], inference_params=params)
        params.seqlen_offset = 5
        last = ours(x[:, 5:], inference_params=params)
        assert_close("out", ours(x)[:, 4:], torch.cat([first, last], dim=1), 1e-5)


def test_packed_sequences_stay_apart(make_mixers, assert_close):
    _, ours = make_mixers("mamba2")
    x, seq_idx = torch.randn(1, 9, 32), torch.tensor([[0] * 4 + [1] * 5])
    expected = torch.cat([ours(x[:, :4]), ours(x[:, 4:])], dim=1)
    assert_close("seq_idx", expected, ours(x, seq_idx=seq_idx), 1e-6)
    assert_close("cu_seqlens", expected, ours(x, cu_seqlens=torch.tensor([0, 4, 9])), 1e-6)
    assert_close("flat", expected[0], ours(x[0], seqlen=9, seq_idx=seq_idx), 1e-6)


def test_what_cannot_run_says_so(make_mixers):
    _, ours = make_mixers("mamba2")
    ours.process_group = object()
    with pytest.raises(ValueError, match="tensor parallel"):
        ours(torch.randn(1, 2, 32))
    _, ours = make_mixers("mamba")
    ours.layer_idx = None
    with pytest.raises(ValueError, match="layer_idx"):
        ours(torch.randn(1, 2, 32), inference_params=inference_params())


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("layer", MODELS)
def test_decoding_with_an_adapter_gives_the_uncached_run(make_model, assert_close, layer, method):
    from peft import get_peft_model

    model = get_peft_model(make_model(layer), CONFIGS[method](init_weights=False)).eval()
    ids = torch.randint(0, 60, (2, 8))
    with torch.no_grad():
        whole = model(ids).logits
        pieces = in_pieces(lambda *args, **kwargs: model(*args, **kwargs).logits, ids, [3, 1, 1, 2, 1])
        assert_close("logits", whole, pieces, 1e-5)
        with model.disable_adapter():
            assert (model(ids).logits - whole).abs().max() > 1e-2
    assert all(type(mixer).__module__.startswith("mamba_ssm.") for _, mixer in find_mixers(model.unload()))


@pytest.mark.parametrize("layer", MODELS)
def test_adapters_go_between_a_model_and_its_twin(make_model, tmp_path, assert_close, layer):
    from peft import LoraConfig, get_peft_model

    theirs = make_model(layer)
    twin, base = (ssmtune.from_mamba_ssm(copy.deepcopy(theirs)) for _ in range(2))
    ids = torch.randint(0, 60, (2, 8))
    with torch.no_grad():
        assert_close("base", theirs(ids).logits, twin(ids).logits, 1e-5)
    get_peft_model(
        twin, LoraConfig(target_modules=["in_proj"], init_lora_weights=False, task_type="CAUSAL_LM"), adapter_name="low"
    )
    trained = get_peft_model(twin, StateOffsetConfig(init_weights=False, task_type="CAUSAL_LM")).eval()
    trained.save_pretrained(tmp_path / "there")
    loaded = ssmtune.load_adapters(theirs, tmp_path / "there").eval()
    with torch.no_grad():
        expected = trained(ids).logits
        assert_close("there", expected, loaded(ids).logits, 1e-5)
        loaded.save_pretrained(tmp_path / "back")
        back = ssmtune.load_adapters(base, tmp_path / "back").eval()
        assert_close("back", expected, back(ids).logits, 1e-5)


@pytest.mark.parametrize("layer", MODELS)
def test_mamba_ssm_reads_what_is_written_for_it(make_model, tmp_path, assert_close, layer):
    model = make_model(layer)
    ssmtune.to_mamba_ssm(ssmtune.from_mamba_ssm(model), tmp_path)
    config = tmp_path / "config.json"
    # Its fused norm is a kernel for GPUs.
    config.write_text(config.read_text().replace('"fused_add_norm": true', '"fused_add_norm": false'))
    again = type(model).from_pretrained(tmp_path)
    # With the mixers of the package Mamba2 would take its fused path.
    ssmtune.patch(again)
    ids = torch.randint(0, 60, (2, 8))
    with torch.no_grad():
        assert_close("logits", model(ids).logits, again(ids).logits, 1e-6)
