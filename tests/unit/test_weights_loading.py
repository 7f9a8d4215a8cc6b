"""Loading teachers from weights files: every naming and number format, pairs, VAEs, memory.

A loaded network is held against the random network that the file was made from.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.errors import AccVideoError
from accvideo_core.models import VideoModel, building
from accvideo_core.models.checkpoint import Checkpoint
from accvideo_core.models.experts import Experts
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.models.quantised import Fp8Linear, GgufLinear, PackedLinear
from tests import tiny, tiny_cogvideox, tiny_hunyuan_i2v, tiny_wan, weight_files
from tests.weight_files import FP8, native, save, with_numbers

SINGLE = (
    *("hunyuan_video", "hunyuan_video_i2v", "wan_t2v", "wan_i2v", "wan22_ti2v"),
    *("cogvideox_2b", "cogvideox_5b", "cogvideox_1_5"),
)
PREFIX = "model.diffusion_model."


def original(family: str, seed: int = 0) -> VideoModel:
    if family == "hunyuan_video":
        return tiny.video_model(seed)
    if family.startswith("hunyuan"):
        return tiny_hunyuan_i2v.video_model(family, seed)
    module = tiny_cogvideox if family.startswith("cog") else tiny_wan
    return module.video_model(family, seed)


def asked(family: str) -> tuple[Tensor, Any]:
    """Latents and a condition that the family's network takes."""
    if family == "hunyuan_video":
        return tiny.latents(), tiny.condition()
    if family.startswith("hunyuan"):
        return tiny_hunyuan_i2v.latents(), tiny_hunyuan_i2v.condition()
    if family.startswith("cog"):
        return tiny_cogvideox.latents(), tiny_cogvideox.condition()
    return tiny_wan.latents(family), tiny_wan.condition(family)


def answer(model: VideoModel, family: str, t: float = 0.5) -> Tensor:
    x, cond = asked(family)
    with torch.no_grad():
        return model.velocity(x, t, cond)


def difference(model: VideoModel, other: VideoModel, family: str, t: float = 0.5) -> float:
    """Largest difference of two networks' answers, relative to the largest answer."""
    expected = answer(other, family, t)
    return float((answer(model, family, t) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", SINGLE)
@pytest.mark.parametrize("naming", ["native", "diffusers"])
def test_a_single_file_is_the_network_it_was_made_from(family: str, naming: str, tmp_path: Path):
    source = original(family)
    state = native(family, source.module)
    state = state if naming == "native" else source.module.state_dict()
    prefix = PREFIX if naming == "native" else ""
    teacher = load_teacher(save(tmp_path / "any.safetensors", state, source.module, prefix))
    assert teacher.model.family.name == family and teacher.model.source == "any.safetensors"
    assert teacher.sources == (tmp_path / "any.safetensors",)
    module = teacher.model.module
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert not any(x.is_meta for x in [*module.parameters(), *module.buffers()])
    assert torch.equal(answer(teacher.model, family), answer(source, family))
    assert teacher.model.fingerprint == source.fingerprint


@pytest.fixture
def hunyuan(tmp_path: Path) -> tuple[Path, VideoModel]:
    source = tiny.video_model()
    state = native("hunyuan_video", source.module)
    return save(tmp_path / "hunyuan.safetensors", state, source.module), source


def test_parts_of_fused_weights_stay_where_the_file_is_mapped(hunyuan: tuple[Path, VideoModel]):
    path, source = hunyuan
    before = path.read_bytes()
    attention = load_teacher(path).model.module.transformer_blocks[0].attn
    q, k, v = (layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v))
    size = q.numel() * q.element_size()
    assert k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == size
    with torch.no_grad():
        q.fill_(1.0)
    assert path.read_bytes() == before


def test_another_dtype_is_asked_for(hunyuan: tuple[Path, VideoModel]):
    model = load_teacher(hunyuan[0], dtype=torch.bfloat16).model
    assert model.dtype == torch.bfloat16 and answer(model, "hunyuan_video").dtype == torch.bfloat16
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["plain", "rows", "Q8_0"])
def test_converting_in_stretches_changes_no_value(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # No layer may stay packed, so that every weight is converted.
    monkeypatch.setattr(building.Network, "_may_stay_packed", lambda *_: False)
    states = []
    for stretch in (2**22, 100):
        monkeypatch.setattr(building, "STRETCH", stretch)
        teacher, dense = packed_teacher("hunyuan_video", kind, tmp_path)
        states.append(teacher.model.module.state_dict())
    whole, cut = states
    assert whole.keys() == cut.keys()
    for name, x in dense.module.state_dict().items():
        assert torch.equal(whole[name], x) and torch.equal(cut[name], x), name


def test_layers_that_diffusers_keeps_in_float32_stay_so(tmp_path: Path):
    source = original("wan_t2v")
    path = save(tmp_path / "wan.safetensors", native("wan_t2v", source.module), source.module)
    source.module.save_pretrained(tmp_path / "folder")
    theirs = type(source.module).from_pretrained(tmp_path / "folder", torch_dtype=torch.bfloat16)
    ours = load_teacher(path, dtype=torch.bfloat16).model
    assert {n: p.dtype for n, p in ours.module.named_parameters()} == {
        n: p.dtype for n, p in theirs.named_parameters()
    }
    assert ours.dtype == torch.bfloat16
    assert torch.equal(
        answer(ours, "wan_t2v"),
        answer(VideoModel(theirs.eval(), ours.family, ours.latent_spec), "wan_t2v"),
    )


def test_other_containers(hunyuan: tuple[Path, VideoModel], tmp_path: Path):
    _, source = hunyuan
    state = native("hunyuan_video", source.module)
    (tmp_path / "pt").mkdir()
    # torch.save has no header to state a configuration in: only true proportions are read.
    names = sorted(state)
    for i, part in enumerate((names[::2], names[1::2])):
        file = tmp_path / "pt" / f"x-{i + 1:05d}-of-00002.safetensors"
        save(file, {name: state[name] for name in part}, source.module)
    teacher = load_teacher(tmp_path / "pt" / "x-00002-of-00002.safetensors")
    assert torch.equal(answer(teacher.model, "hunyuan_video"), answer(source, "hunyuan_video"))
    source.module.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    teacher = load_teacher(tmp_path / "transformer")
    assert torch.equal(answer(teacher.model, "hunyuan_video"), answer(source, "hunyuan_video"))


def test_an_official_pt_file(tmp_path: Path):
    # Of the releases' proportions, as nothing in the file states others.
    from diffusers import HunyuanVideoTransformer3DModel

    module = HunyuanVideoTransformer3DModel(
        num_attention_heads=1,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=tiny.TEXT,
        pooled_projection_dim=tiny.POOLED,
    )
    tiny.randomise(module)
    state = native("hunyuan_video", module)
    torch.save({"module": state, "step": 1}, tmp_path / "mp_rank_00_model_states.pt")
    found = load_teacher(tmp_path / "mp_rank_00_model_states.pt").model.module.state_dict()
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(found[name], x) for name, x in module.state_dict().items())


def packed_teacher(
    family: str, kind: str, path: Path, dtype: torch.dtype = torch.float32
) -> tuple[Teacher, VideoModel]:
    """A teacher from a packed file, and a dense network of the numbers that the file stands for."""
    source = original(family)
    state = native(family, source.module)
    if kind in FP8:
        packed = FP8[kind](state)
        numbers = weight_files.unpacked(packed)
        file = save(path / "packed.safetensors", packed, source.module, PREFIX)
    else:
        pytest.importorskip("gguf")
        file = path / "packed.gguf"
        numbers = weight_files.save_gguf(file, state, kind, weight_files.stated(source.module))
    with_numbers(family, source.module, numbers)
    return load_teacher(file, dtype=dtype), source


KINDS = (*FP8, "Q8_0")


@pytest.mark.parametrize("family", ["hunyuan_video", "wan_i2v", "cogvideox_1_5"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_stay_packed_and_compute_the_numbers_they_stand_for(
    family: str, kind: str, tmp_path: Path
):
    teacher, dense = packed_teacher(family, kind, tmp_path)
    packed = [x for x in teacher.model.module.modules() if isinstance(x, PackedLinear)]
    expected = {"Q8_0": GgufLinear}.get(kind, Fp8Linear)
    assert teacher.model.family.name == family and {type(layer) for layer in packed} <= {expected}
    assert len(packed) > 8 or (kind == "Q8_0" and family == "wan_i2v")  # rows of 24
    assert difference(teacher.model, dense, family) < 1e-6
    assert teacher.model.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_compute_in_bfloat16(kind: str, tmp_path: Path):
    teacher, dense = packed_teacher("hunyuan_video", kind, tmp_path, torch.bfloat16)
    assert teacher.model.dtype == torch.bfloat16
    assert answer(teacher.model, "hunyuan_video").dtype == torch.bfloat16
    assert difference(teacher.model, dense, "hunyuan_video") < 0.05
    again = packed_teacher("hunyuan_video", kind, tmp_path)[0]
    assert again.model.fingerprint == teacher.model.fingerprint


def test_the_note_in_a_header_tells_that_bytes_are_fp8(tmp_path: Path):
    source = original("hunyuan_video")
    packed = weight_files.row_scaled_fp8(native("hunyuan_video", source.module))
    fp8 = [name for name, x in packed.items() if x.dtype == weight_files.E4M3]
    numbers = weight_files.unpacked(packed)
    bits = {name: x.view(torch.uint8) if name in fp8 else x for name, x in packed.items()}
    layers = {n.removesuffix(".weight"): {"format": "float8_e4m3fn"} for n in fp8}
    path = save(
        tmp_path / "x.safetensors",
        bits,
        source.module,
        _quantization_metadata=json.dumps({"layers": layers}),
    )
    with_numbers("hunyuan_video", source.module, numbers)
    assert difference(load_teacher(path).model, source, "hunyuan_video") < 1e-6


INFO = {"family": "hunyuan_video", "key_times": (1.0, 0.5, 0.0), "guidance": 6.0, "frames": 5}


def info(model: VideoModel, lora: LoraSpec | None) -> StudentInfo:
    return StudentInfo(
        **INFO,  # type: ignore[arg-type]
        base=model.fingerprint,
        lora=lora,
        latent_spec=model.latent_spec,
        height=16,
        width=16,
    )


@pytest.mark.parametrize("kind", ["scaled", "Q8_0"])
def test_a_lora_student_trains_on_packed_weights(kind: str, tmp_path: Path):
    teacher, dense = packed_teacher("hunyuan_video", kind, tmp_path)
    x, cond = asked("hunyuan_video")

    def gradients(model: VideoModel, checkpointing: bool = False) -> dict[str, Tensor | None]:
        student = Student.create(model, info(model, LoraSpec(rank=2)))
        values = {n: torch.linspace(-1, 1, p.numel()) for n, p in student.trainable().items()}
        student.load_state_dict(
            {n: values[n].reshape(p.shape) for n, p in student.trainable().items()}
        )
        if checkpointing:
            student.model.module.enable_gradient_checkpointing()  # type: ignore[operator]
        student.velocity(x, 0.5, cond).square().mean().backward()
        return {name: p.grad for name, p in student.trainable().items()}

    ours, theirs = gradients(teacher.model), gradients(dense)
    again = gradients(teacher.model, checkpointing=True)
    assert ours.keys() == theirs.keys() == again.keys()
    for name, gradient in theirs.items():
        assert gradient is not None and gradient.abs().sum() > 0
        for found in (ours[name], again[name]):
            bound = 1e-5 * float(gradient.abs().max())
            assert found is not None and torch.allclose(found, gradient, rtol=1e-3, atol=bound)


@pytest.mark.parametrize("kind", ["plain", "Q8_0"])
def test_a_full_student_of_packed_weights_is_refused(kind: str, tmp_path: Path):
    teacher, _ = packed_teacher("hunyuan_video", kind, tmp_path)
    with pytest.raises(AccVideoError, match="cannot be trained in full; train a LoRA"):
        Student.create(teacher.model, info(teacher.model, None))


@pytest.mark.parametrize("family", ["wan22_t2v", "wan22_i2v"])
def test_two_files_are_a_pair_of_experts(family: str, tmp_path: Path):
    source = original(family)
    paths = [
        save(tmp_path / f"{name}.safetensors", native(family, expert), expert)
        for name, expert in source.module.named_children()
    ]
    teacher = load_teacher(paths)
    assert teacher.model.family.name == family and isinstance(teacher.model.module, Experts)
    assert teacher.sources == tuple(paths)
    for t in (0.99, 0.1):
        assert torch.equal(answer(teacher.model, family, t), answer(source, family, t))
    if family == "wan22_i2v":
        with pytest.raises(AccVideoError, match="one of the two networks of .* together"):
            load_teacher(paths[0])
    other = save(tmp_path / "o.safetensors", native("wan_i2v", o := tiny_wan.network("wan_i2v")), o)
    with pytest.raises(AccVideoError, match="make no pair"):
        load_teacher([paths[0], other])
    with pytest.raises(AccVideoError, match="one file or folder or from a pair, and 3 were"):
        load_teacher([*paths, other])


def test_a_variant_that_tensors_do_not_show_is_asked_for(tmp_path: Path):
    name = "hunyuan_video_i2v_replace"
    source = original(name)
    state = native(name, source.module)
    config = {k: v for k, v in source.module.config.items() if k != "image_condition_type"}
    path = save(tmp_path / "x.safetensors", state, source.module, config=json.dumps(config))
    assert load_teacher(path).model.family.name == "hunyuan_video"
    teacher = load_teacher(path, variant=name)
    assert teacher.model.family.name == name
    assert torch.equal(answer(teacher.model, name), answer(source, name))
    with pytest.raises(AccVideoError, match="cannot be taken for 'wan_t2v'"):
        load_teacher(path, variant="wan_t2v")


@pytest.mark.parametrize("kind", ["float32", *KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_known_before_anything_is_read(
    kind: str,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    if kind == "float32":
        source = original("hunyuan_video")
        state = native("hunyuan_video", source.module)
        teacher = load_teacher(
            save(tmp_path / "packed.safetensors", state, source.module), dtype=dtype
        )
    else:
        teacher, _ = packed_teacher("hunyuan_video", kind, tmp_path, dtype)
    copied: list[int] = []

    def count(self: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        copied.append(math.prod(shape) * dtype.itemsize)
        return take(self, shape, dtype)

    take = building._Block.take
    monkeypatch.setattr(building._Block, "take", count)
    with caplog.at_level(logging.INFO):
        load_teacher(teacher.folder, dtype=dtype)
    assert "HunyuanVideo" in caplog.text and "billion parameters" in caplog.text
    size = sum(copied)
    load_teacher(teacher.folder, dtype=dtype, free_memory=size)
    if kind == "float32" and dtype == torch.float32:
        assert size == 0, "the mapped file needs no memory of its own"
        return

    def fail(_self: Checkpoint, name: str) -> Tensor:
        if not name.endswith("comfy_quant"):
            raise AssertionError(name)
        return kept(_self, name)

    kept = Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", fail)
    with pytest.raises(AccVideoError, match="of memory and only .* GB are free; .*fp8 or GGUF"):
        load_teacher(teacher.folder, dtype=dtype, free_memory=size - 1)


def test_a_file_alone_says_what_it_has_not(hunyuan: tuple[Path, VideoModel]):
    teacher = load_teacher(hunyuan[0])
    with pytest.raises(AccVideoError, match="no text encoders; encode prompts with ComfyUI's CLIP"):
        teacher.encode_prompts(["a red circle"])
    with pytest.raises(AccVideoError, match="no VAE; use ComfyUI's VAE nodes, or load"):
        _ = teacher.vae


def test_everything_loaded_in_inference_mode_can_be_trained_on(hunyuan: tuple[Path, VideoModel]):
    with torch.inference_mode():
        model = load_teacher(hunyuan[0], dtype=torch.float64).model
    assert not any(x.is_inference() for x in [*model.module.parameters(), *model.module.buffers()])


def test_weights_and_fixed_tables_go_to_the_device_asked_for(tmp_path: Path):
    source = original("wan_t2v")
    packed = weight_files.scaled_fp8(native("wan_t2v", source.module))
    path = save(tmp_path / "x.safetensors", packed, source.module)
    module = load_teacher(path, device="meta").model.module
    assert all(x.is_meta for x in [*module.parameters(), *module.buffers()])


def wan_vae_names(module: nn.Module) -> dict[str, str]:
    """diffusers' names of a Wan VAE's tensors -> the official ones, by asking diffusers."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    parts = [
        *(f"residual.{i}.{x}" for i in (0, 2, 3, 6) for x in ("gamma", "weight", "bias")),
        *(f"{p}.{x}" for p in ("shortcut", "resample.1", "time_conv") for x in ("weight", "bias")),
        *("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias"),
    ]
    stems = [f"encoder.downsamples.{i}" for i in range(12)]
    stems += [f"decoder.upsamples.{i}" for i in range(16)]
    stems += [f"{side}.middle.{i}" for side in ("encoder", "decoder") for i in range(3)]
    names = [f"{stem}.{part}" for stem in stems for part in parts]
    for side in ("encoder.", "decoder.", ""):
        names += [f"{side}{conv}.{x}" for conv in ("conv1", "conv2") for x in ("weight", "bias")]
        names += [f"{side}head.{x}" for x in ("0.gamma", "2.weight", "2.bias")]
    found = {}
    for name in names:
        (diffusers_name,) = convert_wan_vae_to_diffusers({name: torch.empty(0)})
        found[diffusers_name] = name
    return {name: found[name] for name in module.state_dict()}


@pytest.mark.parametrize("form", ["official file", "folder", "file in folder"])
def test_a_vae_is_given_beside_a_file(form: str, tmp_path: Path):
    source = original("wan_t2v")
    path = save(tmp_path / "wan.safetensors", native("wan_t2v", source.module), source.module)
    vae = AutoencoderKLWan(base_dim=4)
    tiny.randomise(vae)
    vae.save_pretrained(tmp_path / "vae")
    given = tmp_path / "vae"
    if form == "file in folder":
        given = given / "diffusion_pytorch_model.safetensors"
    elif form == "official file":
        names, given = wan_vae_names(vae), tmp_path / "Wan2.1_VAE.safetensors"
        state = {names[name]: x for name, x in vae.state_dict().items()}
        save(given, state, source.module)
    teacher = load_teacher(path, vae=given)
    found = teacher.vae.module.state_dict()
    assert all(torch.equal(found[name], x) for name, x in vae.state_dict().items())
    x = tiny_wan.latents("wan_t2v", batch=1)
    z = teacher.model.latent_spec.from_model(x)
    with torch.no_grad():
        video = vae.eval().decode(z).sample
    expected = (video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
    assert torch.allclose(teacher.vae.decode(x), expected, atol=1e-5)


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Path]:
    """A native file after `change` of its tensors."""

    def make(folder: Path) -> Path:
        module = tiny.network()
        state = native("hunyuan_video", module)
        change(state)
        return save(folder / "x.safetensors", state, module)

    return make


def noted(kind: str) -> Callable[[Path], Path]:
    note = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    return changed(lambda s: s.update({"double_blocks.0.img_mlp.fc1.comfy_quant": note}))


def blocks_of_scales(state: dict[str, Tensor]) -> None:
    state.update(weight_files.row_scaled_fp8(state))
    state["double_blocks.0.img_mlp.fc1.weight_scale"] = torch.ones(64, 2)


def foreign(*names: str) -> Callable[[Path], Path]:
    state = {name: torch.zeros(4, 4) for name in names}
    return lambda folder: save(folder / "x.safetensors", state, tiny.network())


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


FC1 = "double_blocks.0.img_mlp.fc1.weight"
FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "x.safetensors", "does not exist; check the path"),
    "cut": (lambda folder: cut(changed(dict)(folder)), "damaged or cut short .* download it again"),
    "no bias": (
        changed(lambda s: s.pop("final_layer.linear.bias")),
        r"lacks 1 of the network's weights \(such as proj_out.bias\); download the model again",
    ),
    "no layer": (
        changed(lambda s: [s.pop(n) for n in list(s) if n.startswith("final_layer.linear")]),
        "'x.safetensors' cannot be loaded: .*; ",
    ),
    "unknown": (
        changed(lambda s: s.update({"double_blocks.0.img_extra.weight": torch.zeros(2, 2)})),
        "double_blocks.0.img_extra.weight.*; choose an unmodified",
    ),
    "unknown bias": (
        changed(lambda s: s.update({"double_blocks.0.img_attn_q_norm.bias": torch.zeros(16)})),
        r"has 1 weights that its network has not \(such as .*norm.bias\); choose an unmodified",
    ),
    "shape": (
        changed(lambda s: s.update({FC1: torch.zeros(64, 33)})),
        r"has shape \(64, 33\) where the network has \(64, 32\); choose the file of one whole",
    ),
    "integers": (
        changed(lambda s: s.update({FC1: s[FC1].to(torch.int8)})),
        r"a number format that is not supported \(int8\); use a bf16, fp8 or GGUF file",
    ),
    "nvfp4": (noted("nvfp4"), "weights stored as nvfp4, which is not supported; use a bf16"),
    "odd note": (
        changed(lambda s: s.update({FC1.replace("weight", "comfy_quant"): torch.zeros(3)})),
        "says in no known way how its weights are stored",
    ),
    "block scales": (changed(blocks_of_scales), "neither one number nor one per row; use a bf16"),
    "lora": (
        foreign("diffusion_model.blocks.0.self_attn.q.lora_A.weight"),
        "'x.safetensors' cannot be loaded: this file is a LoRA.*; load it with a LoRA loader",
    ),
    "vae": (foreign("decoder.conv_in.conv.weight"), "this file is a VAE.*; load it with a VAE"),
    "text": (foreign("model.layers.0.self_attn.q_proj.weight"), "is a text encoder.*CLIP loader"),
    "other": (foreign("a.weight", "b.weight"), "Wan, CogVideoX or Stable Video Diffusion network"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_sentence(fault: str, tmp_path: Path):
    make, message = FAULTS[fault]
    path = make(tmp_path)
    with pytest.raises(AccVideoError, match=message) as caught:
        load_teacher(path)
    assert "\n" not in str(caught.value)


def test_every_fault_of_a_vae_is_one_sentence(hunyuan: tuple[Path, VideoModel], tmp_path: Path):
    path, source = hunyuan
    wan = {"decoder.head.0.gamma": torch.ones(4, 1, 1, 1), "conv2.weight": torch.ones(48, 48)}
    large = save(tmp_path / "wan22_vae.safetensors", wan, source.module)
    (tmp_path / "empty").mkdir()
    for vae, message in (
        (tmp_path / "none", "the VAE .*none' does not exist; check the path"),
        (tmp_path / "empty", "holds no VAE; give the folder of a diffusers VAE"),
        (path, "hunyuan.safetensors' is no VAE that can be read; give the folder"),
        (large, "a Wan VAE of 48 channels, which is read from diffusers' folder only; give"),
    ):
        with pytest.raises(AccVideoError, match=message):
            load_teacher(path, vae=vae)
