"""The names of Stable Video Diffusion: every tensor in both namings, and files that are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accvideo_core.errors import AccVideoError
from accvideo_core.models.detect import detect
from accvideo_core.models.keys.svd import key_table
from tests import tiny_svd as tiny

DOWN, UP = "DownBlockSpatioTemporal", "UpBlockSpatioTemporal"
ATTENDS = "CrossAttn{}BlockSpatioTemporal"
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "two layers": {"layers_per_block": 2, "block_out_channels": (32, 64, 64, 96)},
    "three levels, one without attention": {
        "block_out_channels": (32, 32, 64),
        "num_attention_heads": 2,
        "down_block_types": (DOWN, ATTENDS.format("Down"), ATTENDS.format("Down")),
        "up_block_types": (ATTENDS.format("Up"), ATTENDS.format("Up"), UP),
    },
}


def network(name: str) -> Any:
    from diffusers import UNetSpatioTemporalConditionModel

    config = {key: x for key, x in tiny.network().config.items() if not key.startswith("_")}
    return UNetSpatioTemporalConditionModel(**{**config, **CONFIGS[name]})


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_tensor_has_its_place_in_both_namings(name: str):
    module = network(name)
    table, state = key_table(module.config), module.state_dict()
    native = table.to_native(state)
    assert len(native) == len(state)
    back = dict(part for key, x in native.items() for part in table.to_diffusers(key, x))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], x) for key, x in state.items())


@pytest.mark.parametrize("naming", ["native", "diffusers"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_configuration_is_read_from_the_shapes(name: str, naming: str):
    module = network(name)
    state = module.state_dict()
    if naming == "native":
        table = key_table(module.config)
        state = {f"model.diffusion_model.{n}": x for n, x in table.to_native(state).items()}
        state |= {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    found = detect({key: tuple(x.shape) for key, x in state.items()})
    assert (found.family.name, found.naming) == ("svd", naming)
    again = type(module).from_config(found.config).state_dict()
    assert {k: x.shape for k, x in again.items()} == {
        k: x.shape for k, x in module.state_dict().items()
    }
    assert found.parameters == sum(x.numel() for x in module.state_dict().values())


def test_the_releases_own_names_are_met():
    # Of svd.safetensors, whose 1.5 billion parameters are at these places.
    official = {
        "input_blocks.0.0": "conv_in",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.8.1.time_stack.0.ff_in.net.0.proj": (
            "down_blocks.2.attentions.1.temporal_transformer_blocks.0.ff_in.net.0.proj"
        ),
        "input_blocks.11.0.time_stack.emb_layers.1": (
            "down_blocks.3.resnets.1.temporal_res_block.time_emb_proj"
        ),
        "middle_block.1.time_mixer.mix_factor": "mid_block.attentions.0.time_mixer.mix_factor",
        "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks.11.1.time_pos_embed.2": "up_blocks.3.attentions.2.time_pos_embed.linear_2",
        "label_emb.0.2": "add_embedding.linear_2",
        "out.2": "conv_out",
    }
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        module = UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20))
    table = key_table(module.config)
    assert {name: table.parts(name)[0].layer for name in official} == official
    native = table.to_native(module.state_dict())
    found = detect({key: tuple(x.shape) for key, x in native.items()})
    assert found.parameters == 1_524_623_082
    assert found.config["num_attention_heads"] == (5, 10, 20, 20)
    assert found.config["block_out_channels"] == (320, 640, 1280, 1280)


def test_other_unets_and_variants_are_refused():
    module = network("tiny")
    shapes = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    with pytest.raises(AccVideoError, match="SV3D or another variant.*choose svd or svd_xt"):
        detect(shapes | {"conv_in.weight": (32, 4, 3, 3)})
    images = {key: shape for key, shape in shapes.items() if "tempor" not in key}
    with pytest.raises(AccVideoError, match="a UNet of images or a VAE"):
        detect(images)
    torso = {key: shape for key, shape in shapes.items() if not key.startswith("up_blocks.1.")}
    with pytest.raises(AccVideoError, match="lacks .* layers of Stable Video Diffusion"):
        detect(torso)
