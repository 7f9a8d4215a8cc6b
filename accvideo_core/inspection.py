"""What a folder or file is: a dataset, a run, a teacher, a student, or plainly none of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .errors import AccVideoError
from .flow import Times


def describe(path: Path, verify: bool = False) -> str:
    """Text, one fact a line, about what lies at `path`.

    Args:
        verify: also read every record of a dataset or all weights of a student.

    Raises:
        AccVideoError: nothing is there, or it is none of ours, or it is damaged.
    """
    if not path.exists():
        raise AccVideoError(f"there is nothing at {path}; check the path")
    if path.is_file():
        return _student(path, verify) if _is_student(path) else _network(path, verify)
    for name, look in (
        ("dataset.json", _dataset),
        ("config.json", _run),
        ("model_index.json", _teacher),
    ):
        if (path / name).is_file():
            return look(path, verify)
    raise AccVideoError(
        f"{path} is a folder, but no trajectory dataset (it has no dataset.json), no training run "
        "(no config.json) and no teacher (no model_index.json); choose one of those, or a student "
        "file"
    )


def _dataset(path: Path, verify: bool) -> str:
    from .trajectories.listing import read_listing
    from .trajectories.store import TrajectoryDataset

    dataset = TrajectoryDataset.open(path)
    info = dataset.info
    size = sum(file.stat().st_size for file in (path / "records").glob("??/*.safetensors"))
    facts = {
        "records": f"{len(dataset)} ({size / 1e6:.1f} MB, {info.dtype})",
        "prompts": len(list(read_listing(path).ids())),
        "teacher": f"{info.teacher_source} ({info.family}, fingerprint {info.teacher})",
        "size": f"{info.frames} frames of {info.height} x {info.width}",
        "teacher steps": None if info.cutting else len(info.time_grid) - 1,
        "kept times": _times(info.times),
        "clips": info.cutting,
        "guidance": info.guidance,
        "seed": info.seed,
    }
    text = _sheet(f"{path} is a trajectory dataset", facts)
    if not verify:
        return text
    faults = dataset.verify()
    if faults:
        raise AccVideoError(f"{path} has {len(faults)} faults: {'; '.join(map(str, faults))}")
    return f"{text}\n  every record and prompt was read and is whole"


def _run(path: Path, _verify: bool) -> str:
    from .distill.checkpoint import last_step
    from .distill.metrics import METRICS_FILE, read_metrics
    from .distill.recipes import Recipe
    from .files import read_json

    config = read_json(path / "config.json")
    if not isinstance(config, dict) or not {"recipe", "dataset"} <= config.keys():
        raise AccVideoError(
            f"{path} is no training run of AccVideo: its config.json names no recipe and dataset; "
            "choose another folder"
        )
    recipe = Recipe.from_dict(config["recipe"])
    rows = read_metrics(path / METRICS_FILE)
    done = max((int(row["step"]) for row in rows), default=0)
    losses = [row["loss"] for row in rows[-50:]]
    facts = {
        "recipe": recipe.name,
        "objective": recipe.title,
        "student steps": recipe.student_steps,
        "updates": f"{done} of {recipe.train_steps} (last checkpoint {last_step(path)})",
        "loss": f"{sum(losses) / len(losses):.4g} (mean of the last {len(losses)})"
        if losses
        else None,
        "dataset": f"{config['dataset'].get('name')} "
        f"({config['dataset'].get('trajectories')} trajectories)",
    }
    return _sheet(f"{path} is a training run", facts)


def _teacher(path: Path, verify: bool) -> str:
    from .files import read_json
    from .models.pipeline_folder import open_networks

    family, networks = open_networks(path)
    size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    facts = {
        "pipeline": read_json(path / "model_index.json").get("_class_name"),
        "family": family.name,
        "networks": len(networks) if len(networks) > 1 else None,
        "official grid": f"{family.steps} steps, shift {family.shift:g}",
        "weights": f"{size / 1e6:.1f} MB",
    }
    if verify:
        from .models.loading import load_teacher

        teacher = load_teacher(path)
        facts["fingerprint"] = teacher.model.fingerprint
        count = sum(p.numel() for p in teacher.model.module.parameters())
        facts["parameters"] = f"{count / 1e6:.2f} million"
    return _sheet(f"{path} is a teacher", facts)


def _is_student(path: Path) -> bool:
    from .export import read_student_info

    try:
        read_student_info(path)
    except AccVideoError:
        return False
    return True


def _network(path: Path, verify: bool) -> str:
    from .models.checkpoint import open_checkpoint
    from .models.detect import detect

    with open_checkpoint(path) as checkpoint:
        seen = detect(checkpoint.shapes, metadata=checkpoint.metadata)
        kinds = {str(x).removeprefix("torch.") for x in checkpoint.dtypes.values() if x}
        facts = {
            "family": seen.family.title or seen.family.name,
            "parameters": f"{seen.parameters / 1e9:.2f} billion",
            "weights": f"{checkpoint.bytes / 1e9:.2f} GB, {', '.join(sorted(kinds))}",
            "names": "the official release's" if seen.naming == "native" else "diffusers'",
            "official grid": f"{seen.family.steps} steps, shift {seen.family.shift:g}",
        }
    text = _sheet(f"{path} is the network of a teacher", facts)
    if not verify:
        return text
    from .models.loading import load_teacher

    return f"{text}\n  fingerprint    {load_teacher(path).model.fingerprint}"


def _student(path: Path, verify: bool) -> str:
    from .export import read_student_info
    from .files import read_safetensors

    info = read_student_info(path)
    lora = "full weights" if info.lora is None else f"LoRA of rank {info.lora.rank}"
    facts = {
        "kind": f"{lora}, {path.stat().st_size / 1e6:.1f} MB",
        "teacher": f"{info.family}, fingerprint {info.base}",
        "steps": len(info.key_times) - 1,
        "key times": _times(info.key_times),
        "guidance": info.guidance,
        "trained": f"{info.steps_trained} updates, recipe {info.recipe.get('name')}",
        "size": f"{info.frames} frames of {info.height} x {info.width}",
    }
    text = _sheet(f"{path} is a student", facts)
    if not verify:
        return text
    tensors, _ = read_safetensors(path)
    return f"{text}\n  all {len(tensors)} tensors were read and are whole"


def _sheet(title: str, facts: Mapping[str, object]) -> str:
    width = max(len(name) for name in facts)
    known = {name: value for name, value in facts.items() if value is not None}
    return "\n".join([title, *(f"  {name.ljust(width)}  {v}" for name, v in known.items())])


def _times(times: Times) -> str:
    return ", ".join(f"{t:.4f}".rstrip("0").rstrip(".") for t in times)
