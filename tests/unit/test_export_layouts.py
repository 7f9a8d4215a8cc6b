"""Exports for ComfyUI and diffusers: what they say, what they cost, and that they come back."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_export import trained
from test_student import make

from accvideo_core import export
from accvideo_core.distill.student import LoraSpec
from accvideo_core.errors import AccVideoError
from accvideo_core.export import (
    export_student,
    load_student,
    native_lora,
    read_student_info,
    save_student,
)
from accvideo_core.models import VideoModel
from accvideo_core.models.experts import Experts
from accvideo_core.models.lora import apply_loras
from tests import tiny_families, tiny_wan
from tests.lora_files import factors_of, native_shapes, packed, write


@pytest.fixture
def teacher() -> VideoModel:
    return tiny.video_model()


LAYOUTS = [("native", "lora"), ("diffusers", "lora"), ("native", "full"), ("diffusers", "full")]


def target(folder: Path, layout: str, what: str) -> Path:
    return folder / ("out" if (layout, what) == ("diffusers", "full") else "out.safetensors")


@pytest.mark.parametrize(("layout", "what"), LAYOUTS)
@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_every_layout_comes_back(name: str, layout: str, what: str, tmp_path: Path) -> None:
    """A LoRA bit for bit; full weights as the merged student computes."""
    case = tiny_families.case(name)
    student = trained(case.model, LoraSpec(rank=3, alpha=None if what == "lora" else 4.5))
    path = target(tmp_path, layout, what)
    result = export_student(student, path, layout=layout, what=what, dtype="fp32")
    pair = isinstance(case.model.module, Experts) and not path.suffix == ""
    assert len(result.files) == (2 if pair else 1) and result.errors == ()
    for given in {path, *result.files}:
        loaded = load_student(given, case.model)
        assert read_student_info(given) == loaded.info
        if what == "lora":
            assert loaded.info == student.info
            for key, x in student.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], x), key
        else:
            assert loaded.info == replace(student.info, lora=None)
        torch.testing.assert_close(
            loaded.velocity(case.x, 0.4, case.condition),
            student.velocity(case.x, 0.4, case.condition),
            rtol=1e-4,
            atol=1e-5,
        )
        torch.testing.assert_close(
            case.velocities(loaded.model), case.velocities(student.model), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_native_lora_is_what_the_file_holds(name: str, tmp_path: Path) -> None:
    case = tiny_families.case(name)
    student = trained(case.model, LoraSpec(rank=3, alpha=4.5))
    if isinstance(case.model.module, Experts):
        with pytest.raises(AccVideoError, match="two experts and so two LoRAs"):
            native_lora(student)
        return
    (path,) = export_student(student, tmp_path / "lora.safetensors").files
    held, made = load_file(path), native_lora(student)
    assert made.keys() == held.keys()
    assert all(torch.equal(made[key], x) and made[key].dtype == x.dtype for key, x in held.items())


def test_full_student_has_no_lora(teacher: VideoModel) -> None:
    with pytest.raises(AccVideoError, match="full weights and no LoRA; use Save Student"):
        native_lora(trained(teacher, None))


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_a_native_lora_is_a_lora_to_our_reader(name: str, tmp_path: Path) -> None:
    case = tiny_families.case(name)
    student = trained(case.model, LoraSpec(rank=3, alpha=4.5))
    expected = case.velocities(student.model)
    result = export_student(student, tmp_path / "a.safetensors", dtype="fp32")
    assert all(n.startswith("diffusion_model.") for f in result.files for n in load_file(f))
    for how in ("merge", "adapter"):
        model = apply_loras(case.model, [(file, 1.0) for file in result.files], how=how)
        torch.testing.assert_close(case.velocities(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_diffusers_loads_the_folder_strictly(name: str, tmp_path: Path) -> None:
    import diffusers

    case = tiny_families.case(name)
    student = trained(case.model, LoraSpec(rank=3))
    export_student(student, tmp_path / "out", layout="diffusers", what="full", dtype="fp32")
    cls = getattr(diffusers, case.model.family.transformer_class)
    networks = []
    family = case.model.family
    for folder in (family.folder, "transformer_2")[: family.experts]:
        network, info = cls.from_pretrained(
            tmp_path / "out", subfolder=folder, output_loading_info=True, local_files_only=True
        )
        assert not any(info.values()), info
        networks.append(network.eval())
    module = Experts(*networks) if len(networks) == 2 else networks[0]
    found = case.velocities(replace(case.model, module=module))
    torch.testing.assert_close(found, case.velocities(student.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hunyuan_video", "wan_i2v", "wan22_t2v", "cogvideox_5b", "svd"])
def test_a_full_native_file_is_a_teacher(name: str, tmp_path: Path) -> None:
    from accvideo_core.models.loading import load_teacher

    case = tiny_families.case(name)
    student = trained(case.model, LoraSpec(rank=3))
    result = export_student(student, tmp_path / "a.safetensors", what="full", dtype="fp32")
    loaded = load_teacher(result.files).model
    assert loaded.family.name == name
    found = case.velocities(replace(loaded, latent_spec=case.model.latent_spec))
    torch.testing.assert_close(found, case.velocities(student.model), rtol=1e-4, atol=1e-5)


def test_sharded_folders_and_the_rest_of_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import HunyuanVideoPipeline

    from accvideo_core.models.loading import load_teacher

    source = tiny.save_random_pipeline(tmp_path / "teacher")
    student = trained(load_teacher(source).model, LoraSpec(rank=3))
    monkeypatch.setattr(export, "SHARD_BYTES", 2_000_000)

    def write() -> export.Exported:
        return export_student(
            student,
            tmp_path / "fast",
            layout="diffusers",
            what="full",
            dtype="bf16",
            pipeline=source,
        )

    assert write().summary().startswith("fast (")
    shards = sorted((tmp_path / "fast" / "transformer").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name.startswith("diffusion_pytorch_model-00001-of-0000")
    assert all(path.stat().st_size < 2_200_000 for path in shards)
    assert (tmp_path / "fast/vae/config.json").samefile(source / "vae/config.json")
    pipeline = HunyuanVideoPipeline.from_pretrained(tmp_path / "fast", local_files_only=True)
    merged = load_student(tmp_path / "fast", student.teacher).model.module.state_dict()
    for name, x in pipeline.transformer.state_dict().items():
        assert torch.equal(x, merged[name]), name
    write()  # replaces its own
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(AccVideoError, match="other already exists and is no export"):
        export_student(student, tmp_path / "other", layout="diffusers", what="full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fast", "other", "teacher"]


@pytest.mark.parametrize(("dtype", "unit"), [("bf16", 2**-8), ("fp16", 2**-11)])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_halves_are_rounded_once(
    teacher: VideoModel, tmp_path: Path, layout: str, dtype: str, unit: float
) -> None:
    student = trained(teacher, LoraSpec(rank=3))
    exact = export_student(
        student, target(tmp_path, layout, "full"), layout=layout, what="full", dtype="fp32"
    )
    short = export_student(
        student, target(tmp_path / "s", layout, "full"), layout=layout, what="full", dtype=dtype
    )
    weights = [
        load_file(p)
        for folder in (exact.files[0], short.files[0])
        for p in (sorted(folder.rglob("*.safetensors")) or [folder])
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, x in weights[1].items():
        assert x.dtype == export.DTYPES[dtype]
        assert torch.equal(x, weights[0][name].to(x.dtype))
        assert (x.float() - weights[0][name]).abs().max() <= unit * weights[0][name].abs().max()


@pytest.mark.parametrize("name", ["hunyuan_video", "wan22_t2v"])
def test_fp8_is_comfyuis_layout(name: str, tmp_path: Path) -> None:
    case = tiny_families.case(name)
    student = trained(case.model, LoraSpec(rank=3))
    plain = export_student(student, tmp_path / "plain.safetensors", what="full", dtype="bf16")
    result = export_student(student, tmp_path / "fp8.safetensors", what="full", dtype="fp8")
    assert len(result.errors) == len(result.files) == case.model.family.experts
    for file, reference, error in zip(result.files, plain.files, result.errors, strict=True):
        tensors, exact = load_file(file), load_file(reference)
        assert tensors.pop("scaled_fp8").shape == (2,)
        scales = {n: x for n, x in tensors.items() if n.endswith(".scale_weight")}
        weights = {n: x for n, x in tensors.items() if n not in scales}
        assert weights.keys() == exact.keys() and scales
        lost = total = 0.0
        for key, x in weights.items():
            scale = scales.get(f"{key.removesuffix('weight')}scale_weight")
            inside = "blocks." in key and x.dim() == 2 and not key.startswith("txt_in")
            assert (scale is not None) == inside, key
            if scale is None:
                assert torch.equal(x, exact[key])
                continue
            assert x.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
            assert scale.dim() == 0 and x.float().abs().max() == 448
            difference = (x.float() * scale - exact[key].float()).double()
            lost += float(difference.square().sum())
            total += float(exact[key].double().square().sum())
            assert difference.abs().max() <= 448 * float(scale) * 2**-4
        assert error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
        assert 0.005 < error < 0.04
    assert "relative error" in result.summary()
    assert result.files[0].stat().st_size < plain.files[0].stat().st_size
    v = case.velocities(load_student(result.files[0], case.model).model)
    reference = case.velocities(student.model)
    assert (v - reference).norm() < 0.2 * reference.norm()


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_lower_rank_tells_its_error(teacher: VideoModel, tmp_path: Path, layout: str) -> None:
    student = trained(teacher, LoraSpec(rank=4))

    def write(rank: int | None) -> export.Exported:
        path = tmp_path / f"{rank}.safetensors"
        return export_student(student, path, layout=layout, dtype="fp32", rank=rank)

    def products(path: Path) -> dict[str, torch.Tensor]:
        x, ending = load_file(path), ".lora_A.weight"
        names = [n.removesuffix(ending) for n in x if n.endswith(ending)]
        return {n: (x[f"{n}.lora_B.weight"] @ x[n + ending]).double() for n in names}

    exact = products(write(None).files[0])
    total = sum(float(x.square().sum()) for x in exact.values())
    errors = []
    for rank in (2, 6, 16):
        result = write(rank)
        found = products(result.files[0])
        lost = sum(float((found[n] - x).square().sum()) for n, x in exact.items())
        best = sum(float(torch.linalg.svdvals(x)[rank:].square().sum()) for x in exact.values())
        assert lost == pytest.approx(best, rel=1e-3, abs=1e-6)
        assert result.errors[0] == pytest.approx((best / total) ** 0.5, rel=1e-3, abs=1e-6)
        errors.append(result.errors[0])
        ranks = {
            x.shape[0] for n, x in load_file(result.files[0]).items() if n.endswith("A.weight")
        }
        assert max(ranks) <= rank
        loaded = load_student(result.files[0], teacher)
        merged = apply_loras(teacher, [(result.files[0], 1.0)])
        x, cond = tiny.latents(), tiny.condition()
        torch.testing.assert_close(
            loaded.velocity(x, 0.6, cond), merged.velocity(x, 0.6, cond), rtol=1e-4, atol=1e-5
        )
    native = layout == "native"
    assert (errors[0] > errors[1] > 0) if native else (errors[0] > 0 == errors[1])
    assert (
        errors[2] == 0 and load_student(tmp_path / "16.safetensors", teacher).info == student.info
    )
    with pytest.raises(AccVideoError, match="rank 0|at least 1"):
        write(0)


def test_an_untrained_student_comes_back_too(teacher: VideoModel, tmp_path: Path) -> None:
    """Its B matrices are zero and show no blocks."""
    student = make(teacher, LoraSpec(rank=4, targets=("to_q", "to_v", "proj_mlp")))
    export_student(student, tmp_path / "a.safetensors", dtype="fp32")
    loaded = load_student(tmp_path / "a.safetensors", teacher).state_dict()
    assert all(torch.equal(loaded[n], x) for n, x in student.state_dict().items())


def test_a_student_on_a_teacher_with_loras_is_exported_whole(tmp_path: Path) -> None:
    """Full weights have the teacher's own LoRAs in them, however they were kept."""
    case = tiny_families.case("wan_t2v")
    path = write(tmp_path / "style.safetensors", factors_of(native_shapes(case.model)))
    for base in (case.model, packed(case.model)):
        for how in ("merge", "adapter"):
            teacher = apply_loras(base, [(path, 0.5)], how=how)
            student = trained(teacher, LoraSpec(rank=2))
            result = export_student(student, tmp_path / "a", what="full", layout="diffusers",
                                    dtype="fp32")  # fmt: skip
            network = tiny_wan.network("wan_t2v", seed=8)
            network.load_state_dict(load_file(next(result.files[0].rglob("*.safetensors"))))
            found = case.velocities(replace(case.model, module=network))
            torch.testing.assert_close(found, case.velocities(student.model), rtol=1e-4, atol=1e-5)


def test_experts_in_the_projects_own_file(tmp_path: Path) -> None:
    case = tiny_families.case("wan22_t2v")
    for lora in (LoraSpec(rank=2), None):
        student = trained(case.model, lora)
        path = save_student(student, tmp_path / f"{lora is None}.safetensors")
        loaded = load_student(path, case.model)
        for name, x in student.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], x), name
        if lora is not None:
            names = set(load_file(path))
            assert "transformer_2.blocks.0.attn1.to_q.lora_A.weight" in names
            merged = apply_loras(case.model, [(path, 1.0)])
            torch.testing.assert_close(
                case.velocities(merged), case.velocities(student.model), rtol=1e-4, atol=1e-5
            )


def test_half_a_pair_is_named(tmp_path: Path) -> None:
    case = tiny_families.case("wan22_t2v")
    result = export_student(trained(case.model, LoraSpec(rank=2)), tmp_path / "a.safetensors")
    assert [p.name for p in result.files] == ["a_high_noise.safetensors", "a_low_noise.safetensors"]
    other = trained(case.model, LoraSpec(rank=3))
    export_student(other, tmp_path / "b" / "a.safetensors")
    low = result.files[1].read_bytes()
    result.files[1].write_bytes((tmp_path / "b" / "a_low_noise.safetensors").read_bytes())
    with pytest.raises(
        AccVideoError, match="a_low_noise.safetensors and its pair are two students"
    ):
        load_student(result.files[0], case.model)
    result.files[1].unlink()
    with pytest.raises(AccVideoError, match="'a_low_noise.safetensors' is missing"):
        load_student(result.files[0], case.model)
    result.files[1].write_bytes(low)
    load_student(result.files[0], case.model)


def test_the_header_says_how_to_sample(tmp_path: Path) -> None:
    student = trained(tiny.video_model(), LoraSpec(rank=2))
    result = export_student(student, tmp_path / "a.safetensors", what="full")
    with safe_open(result.files[0], framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["accvideo.sigmas"]) == [1.0, 0.8, 0.0]
    assert header["accvideo.steps"] == "2" and header["accvideo.cfg"] == "1.0"
    assert header["modelspec.title"] == "HunyuanVideo in 2 steps (AccVideo student)"
    assert header["modelspec.usage_hint"] == "euler, sigmas 1, 0.8, 0; cfg 1, guidance 6"
    assert json.loads(header["config"])["rope_axes_dim"] == [4, 6, 6]


def test_files_follow_from_the_student_alone(tmp_path: Path) -> None:
    student = trained(tiny.video_model(), LoraSpec(rank=2))
    for dtype, what in (("bf16", "lora"), ("bf16", "full"), ("fp8", "full")):
        one, two = (
            export_student(student.clone(), tmp_path / f"{i}.safetensors", what=what, dtype=dtype)
            for i in range(2)
        )
        assert one.files[0].read_bytes() == two.files[0].read_bytes()


def test_exporting_changes_nothing(teacher: VideoModel, tmp_path: Path) -> None:
    student = trained(teacher, LoraSpec(rank=2))
    before = copy.deepcopy(student.model.module.state_dict())
    for layout, what in LAYOUTS:
        export_student(student, target(tmp_path / what, layout, what), layout=layout, what=what)
    after = student.model.module.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"layout": "comfy"}, "layout is 'comfy'; it must be one of native, diffusers"),
        ({"what": "half"}, "what is 'half'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": "fp8"}, "fp8 is for full weights in the native layout"),
        ({"what": "full", "rank": 4}, "rank is 4; .* goes with what = lora"),
        ({"layout": "diffusers", "what": "full"}, "becomes a folder and must not end in"),
        ({"path": "x"}, "becomes a file and must end in .safetensors"),
    ],
)
def test_choices_that_do_not_go_together(
    teacher: VideoModel, tmp_path: Path, choice: dict[str, object], message: str
) -> None:
    path = tmp_path / str(choice.pop("path", "x.safetensors"))
    with pytest.raises(AccVideoError, match=message):
        export_student(make(teacher, LoraSpec(rank=2)), path, **choice)  # pyright: ignore
    assert not list(tmp_path.iterdir())


def test_a_full_student_has_no_lora(teacher: VideoModel, tmp_path: Path) -> None:
    student = trained(teacher, None)
    with pytest.raises(AccVideoError, match="has full weights and no LoRA"):
        export_student(student, tmp_path / "a.safetensors")
    result = export_student(student, tmp_path / "a.safetensors", what="full", dtype="fp32")
    loaded = load_student(result.files[0], teacher)
    assert all(torch.equal(loaded.state_dict()[n], x) for n, x in student.state_dict().items())
