"""Key tables against their inverses, against diffusers' networks and against its converters."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from accvideo_core.errors import AccVideoError
from accvideo_core.models.keys import cogvideox, hunyuan_video, wan
from accvideo_core.models.keys.spelling import canonical, is_companion
from accvideo_core.models.keys.table import KeyTable, fused, one

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "mlp_ratio": 3.0,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
}
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 12,
    "text_embed_dim": 20,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
}
CASES: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "hunyuan_video": (hunyuan_video, HUNYUAN),
    "hunyuan_video without guidance": (hunyuan_video, HUNYUAN | {"guidance_embeds": False}),
    "hunyuan_video_i2v": (
        hunyuan_video,
        HUNYUAN | {"in_channels": 9, "image_condition_type": "latent_concat"},
    ),
    "hunyuan_video_i2v_replace": (
        hunyuan_video,
        HUNYUAN | {"image_condition_type": "token_replace"},
    ),
    "wan_t2v": (wan, WAN),
    "wan_i2v": (wan, WAN | {"in_channels": 12, "image_dim": 10, "added_kv_proj_dim": 24}),
    "wan22_i2v": (wan, WAN | {"in_channels": 12}),
    "wan22_ti2v": (wan, WAN | {"in_channels": 48, "out_channels": 48}),
    "wan without cross norm": (wan, WAN | {"cross_attn_norm": False}),
    "cogvideox_2b": (cogvideox, COGVIDEOX),
    "cogvideox_5b": (cogvideox, COGVIDEOX | {"use_rotary_positional_embeddings": True}),
    "cogvideox_1_5": (
        cogvideox,
        COGVIDEOX
        | {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
    ),
}


def network(architecture: ModuleType, config: dict[str, Any]) -> nn.Module:
    return getattr(diffusers, architecture.CLASS)(**config)


@pytest.fixture(params=CASES, ids=[name.replace(" ", "-") for name in CASES])
def case(request: pytest.FixtureRequest) -> tuple[KeyTable, dict[str, Tensor]]:
    """The table of a tiny network, and that network's state dict with random values."""
    architecture, config = CASES[request.param]
    module = network(architecture, config)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(x.shape, generator=generator) for name, x in module.state_dict().items()
    }
    return architecture.key_table(module.config), state


def back(table: KeyTable, native: dict[str, Tensor]) -> dict[str, Tensor]:
    """Native tensors -> diffusers tensors, one by one; fails when a name comes twice."""
    result: dict[str, Tensor] = {}
    for name, x in native.items():
        for other, part in table.to_diffusers(name, x):
            assert other not in result
            result[other] = part
    return result


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


def test_diffusers_to_native_and_back_changes_nothing(case):
    table, state = case
    native = table.to_native(state)
    assert_equal(back(table, native), state)
    assert_equal(table.to_native(back(table, native)), native)
    assert sum(x.numel() for x in native.values()) == sum(x.numel() for x in state.values())


def test_table_lists_exactly_the_networks_layers(case):
    table, state = case
    layers = set(table.diffusers_layers())
    assert {name if name in layers else name.rpartition(".")[0] for name in state} == layers
    assert len(layers) == len(table.diffusers_layers())
    for native in table.native_layers():
        parts = table.parts(native)
        assert [table.whole(part.layer) for part in parts] == [native] * len(parts)
        assert [table.part(part.layer) for part in parts] == list(parts)
        stops = [part.stop for part in parts]
        assert [part.start for part in parts] == [0, *stops[:-1]]


def test_wan_agrees_with_diffusers_converter():
    for config in (WAN, WAN | {"in_channels": 12, "image_dim": 10, "added_kv_proj_dim": 24}):
        module = network(wan, config)
        state = {name: torch.randn(x.shape) for name, x in module.state_dict().items()}
        native = wan.key_table(module.config).to_native(state)
        convert = single_file_utils.convert_wan_transformer_to_diffusers
        assert_equal(convert(dict(native)), state)


def test_hunyuan_video_agrees_with_diffusers_converter_at_full_width():
    """The converter knows width 3072 only, but looks at rows only: the columns may be few."""
    with torch.device("meta"):
        module = network(hunyuan_video, {"num_layers": 2, "num_single_layers": 2})
    table = hunyuan_video.key_table(module.config)
    native = {
        name: torch.randn(x.shape[0], 1) for name, x in table.to_native(module.state_dict()).items()
    }
    convert = single_file_utils.convert_hunyuan_video_transformer_to_diffusers
    converted = convert(dict(native))
    assert_equal(back(table, native), converted)
    assert converted.keys() == module.state_dict().keys()


def test_shift_and_scale_of_the_last_layer_change_places():
    module = network(hunyuan_video, HUNYUAN)
    table = hunyuan_video.key_table(module.config)
    native = torch.arange(64.0)
    ((name, x),) = table.to_diffusers("final_layer.adaLN_modulation.1.bias", native)
    assert name == "norm_out.linear.bias"
    assert torch.equal(x, torch.cat([native[32:], native[:32]]))


def test_fused_rows_are_views_in_every_storage():
    table = KeyTable({"qkv": fused(("q", 4), ("k", 4), ("v", 8)), "last": one("o", 4, swap=True)})
    for x in (torch.randn(16, 6), torch.randn(16, 6).to(torch.float8_e4m3fn)):
        parts = table.to_diffusers("qkv.weight", x)
        assert [(name, tuple(part.shape)) for name, part in parts] == [
            ("q.weight", (4, 6)),
            ("k.weight", (4, 6)),
            ("v.weight", (8, 6)),
        ]
        assert {part.untyped_storage().data_ptr() for _, part in parts} == {
            x.untyped_storage().data_ptr()
        }
        whole = table.to_native(dict(parts))["qkv.weight"]
        assert whole.dtype == x.dtype and torch.equal(whole.float(), x.float())
        ((_, last),) = table.to_diffusers("last.weight", x[:4])
        assert torch.equal(last.float(), x[:4].float().roll(2, 0))
    meta = table.to_diffusers("qkv.weight", torch.empty(16, 6, device="meta"))
    assert all(part.is_meta for _, part in meta)


def test_gguf_parameters_keep_their_kind():
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter

    table = KeyTable({"qk": fused(("q", 2), ("k", 2)), "last": one("o", 4, swap=True)})
    raw = torch.arange(4 * 34, dtype=torch.uint8).reshape(4, 34)
    x = GGUFParameter(raw, quant_type=gguf.GGMLQuantizationType.Q8_0)
    for name in ("qk.weight", "last.weight"):
        for _, part in table.to_diffusers(name, x):
            assert isinstance(part, GGUFParameter) and part.quant_type == x.quant_type


def test_scale_of_a_whole_tensor_belongs_to_every_part():
    table = KeyTable({"qkv": fused(("q", 4), ("k", 4)), "o": one("out", 4, swap=True)})
    for scale in (torch.tensor(0.5), torch.tensor([0.5])):
        found = dict(table.to_diffusers("qkv.scale_weight", scale))
        assert_equal(found, {"q.scale_weight": scale, "k.scale_weight": scale})
        assert table.to_diffusers("o.scale_weight", scale) == [("out.scale_weight", scale)]


def test_part_of_the_network_converts_but_not_part_of_a_fused_layer():
    table = KeyTable({"qkv": fused(("q", 4), ("k", 4)), "o": one("out", 4)})
    assert table.to_native({"out.weight": torch.ones(4, 2)}).keys() == {"o.weight"}
    with pytest.raises(AccVideoError, match="'k.weight' is missing"):
        table.to_native({"q.weight": torch.ones(4, 2)})
    with pytest.raises(AccVideoError, match="'q.bias' has shape .5,. where 4 rows"):
        table.to_native({"q.bias": torch.ones(5), "k.bias": torch.ones(4)})
    with pytest.raises(AccVideoError, match="'qkv.weight' has shape .9, 2. where 8 rows"):
        table.to_diffusers("qkv.weight", torch.ones(9, 2))
    with pytest.raises(KeyError):
        table.to_native({"else.weight": torch.ones(4)})
    with pytest.raises(KeyError):
        table.to_diffusers("else.weight", torch.ones(4))


def test_table_that_is_no_bijection_is_refused():
    with pytest.raises(ValueError, match="not new"):
        KeyTable({"a": one("x", 4), "b": one("x", 4)})
    with pytest.raises(ValueError, match="gap"):
        KeyTable({"a": (*one("x", 4), *one("y", 4))})


COMFYUI_SPELLING = {
    "img_in.proj.weight": "img_in.proj.weight",
    "time_in.in_layer.weight": "time_in.mlp.0.weight",
    "guidance_in.out_layer.bias": "guidance_in.mlp.2.bias",
    "vector_in.in_layer.weight": "vector_in.in_layer.weight",
    "txt_in.t_embedder.in_layer.weight": "txt_in.t_embedder.mlp.0.weight",
    "txt_in.c_embedder.out_layer.bias": "txt_in.c_embedder.linear_2.bias",
    "txt_in.individual_token_refiner.blocks.1.self_attn.qkv.weight": (
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.weight"
    ),
    "txt_in.individual_token_refiner.blocks.1.mlp.0.bias": (
        "txt_in.individual_token_refiner.blocks.1.mlp.fc1.bias"
    ),
    "double_blocks.12.img_mod.lin.weight": "double_blocks.12.img_mod.linear.weight",
    "double_blocks.12.txt_attn.qkv.bias": "double_blocks.12.txt_attn_qkv.bias",
    "double_blocks.12.txt_attn.proj.weight": "double_blocks.12.txt_attn_proj.weight",
    "double_blocks.0.img_attn.norm.query_norm.weight": "double_blocks.0.img_attn_q_norm.weight",
    "double_blocks.0.img_attn.norm.key_norm.scale": "double_blocks.0.img_attn_k_norm.weight",
    "double_blocks.0.img_mlp.2.weight": "double_blocks.0.img_mlp.fc2.weight",
    "single_blocks.3.modulation.lin.bias": "single_blocks.3.modulation.linear.bias",
    "single_blocks.3.norm.query_norm.scale": "single_blocks.3.q_norm.weight",
    "single_blocks.3.linear1.weight": "single_blocks.3.linear1.weight",
    "final_layer.adaLN_modulation.1.weight": "final_layer.adaLN_modulation.1.weight",
    # Companions keep their suffix, and so do adapters.
    "double_blocks.0.img_attn.qkv.scale_weight": "double_blocks.0.img_attn_qkv.scale_weight",
    "single_blocks.3.modulation.lin.comfy_quant": "single_blocks.3.modulation.linear.comfy_quant",
    "double_blocks.0.img_mlp.0.lora_A.weight": "double_blocks.0.img_mlp.fc1.lora_A.weight",
    # Other networks stay as they are.
    "blocks.0.self_attn.q.weight": "blocks.0.self_attn.q.weight",
    "transformer_blocks.0.attn.to_q.weight": "transformer_blocks.0.attn.to_q.weight",
}


@pytest.mark.parametrize(
    "prefix",
    ["", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "module.model."],
)
def test_comfyui_spelling_and_prefixes_are_undone(prefix):
    found = canonical(prefix + name for name in COMFYUI_SPELLING)
    assert found == {prefix + name: native for name, native in COMFYUI_SPELLING.items()}
    again = canonical(found.values())
    assert all(name == spelled for name, spelled in again.items())


def test_other_parts_of_a_combined_checkpoint_are_ignored():
    names = ["model.diffusion_model.head.modulation", "model.diffusion_model.scaled_fp8"]
    others = ["first_stage_model.conv1.weight", "cond_stage_model.token_embedding.weight", "logit"]
    assert list(canonical(names + others).items()) == [
        (names[0], "head.modulation"),
        (names[1], "scaled_fp8"),
    ]
    mixed = canonical(["transformer.proj_out.weight", "vae.conv.weight", "scaled_fp8"])
    assert mixed == {"transformer.proj_out.weight": "proj_out.weight", "scaled_fp8": "scaled_fp8"}


def test_a_prefix_that_not_all_share_stays():
    names = ["model.a.weight", "b.weight"]
    assert canonical(names) == {name: name for name in names}


def test_companions_are_told_from_tensors():
    assert is_companion("scaled_fp8")
    for suffix in ("scale_weight", "scale_input", "weight_scale", "input_scale", "comfy_quant"):
        assert is_companion(f"blocks.0.ffn.0.{suffix}")
    for name in ("blocks.0.ffn.0.weight", "blocks.0.modulation", "scale_shift_table"):
        assert not is_companion(name)


def test_tensors_that_no_network_reads_are_left_out():
    kept = "blocks.0.attn2.norm_added_k.weight"
    assert canonical([kept, "blocks.0.attn2.norm_added_q.weight"]) == {kept: kept}


def test_probe_tables_have_one_block_of_everything():
    for architecture in (hunyuan_video, wan, cogvideox):
        table = architecture.key_table(architecture.PROBE)
        assert all(table.whole(marker) for marker in architecture.MARKERS)
        assert any("blocks.0." in layer for layer in table.native_layers())
        assert not any("blocks.1." in layer for layer in table.native_layers())
