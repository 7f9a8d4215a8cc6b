"""SF-V, LADD and UFOGen: levels and losses against arithmetic by hand, and who gets gradients.

Shapes: B batch, C channels, T latent frames, H, W latent size; h, w token grid; D token width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import analytic
import numpy as np
import pytest
import tiny
import tiny_wan
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accvideo_core.conditioning import Condition
from accvideo_core.distill.batch import KeyBatch
from accvideo_core.distill.heads import Heads
from accvideo_core.distill.ladd import logit_normal
from accvideo_core.distill.methods import METHODS
from accvideo_core.distill.objective import Term
from accvideo_core.distill.optimiser import Role
from accvideo_core.distill.projection import condition_vector, prompt_vector, time_code
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.renoised import RenoisedGame, even_blocks
from accvideo_core.distill.setting import Setting
from accvideo_core.distill.sf_v import level_weights, pseudo_huber, sigma_grid, training_times
from accvideo_core.distill.specs import LaddSpec, SfvSpec, UfogenSpec
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.errors import AccVideoError
from accvideo_core.models import VideoModel

TIMES = (1.0, 0.6, 0.0)
SFV = Recipe(
    sf_v=SfvSpec(),
    student_steps=1,
    head_width=16,
    adv_weight=1.0,
    gan_loss="hinge",
    head_kind="spatial_temporal",
    head_conditioning=True,
    lora=LoraSpec(rank=4),
)
LADD = replace(SFV, sf_v=None, ladd=LaddSpec(), student_steps=2)
UFOGEN = replace(SFV, sf_v=None, ufogen=UfogenSpec(), student_steps=2)


class Recording(VideoModel):
    """Writes down what its features are asked of."""

    def features(self, x_t, t, cond, blocks):  # type: ignore[no-untyped-def]
        self.__dict__.setdefault("seen", []).append((x_t.detach().clone(), t, tuple(blocks)))
        return VideoModel.features(self, x_t, t, cond, blocks)


def student_of(teacher: VideoModel, lora: LoraSpec | None = SFV.lora) -> Student:
    info = StudentInfo(
        *(teacher.family.name, teacher.fingerprint, TIMES, teacher.family.guidance, lora),
        *(teacher.latent_spec, 5, 16, 16),
    )
    student = Student.create(teacher, info)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in student.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return student


def batch_of(size: int = 4) -> KeyBatch:
    return KeyBatch(
        latents=tiny.latents(size, seed=5)[None],
        t=(0.0,),
        cond=tiny.condition(size),
        z=tiny.latents(size, seed=6),
        u=torch.rand(size, generator=torch.Generator().manual_seed(7)),
        key="0/0",
    )


def game_of(
    recipe: Recipe = SFV, teacher: VideoModel | None = None, batch: KeyBatch | None = None
) -> tuple[Student, RenoisedGame, KeyBatch]:
    plain = teacher or tiny.video_model()
    known, batch = Recording(plain.module, plain.family, plain.latent_spec), batch or batch_of()
    setting = Setting(recipe, known, TIMES, lambda _count: batch)
    game = METHODS[recipe.method].build(setting)
    assert isinstance(game, RenoisedGame)
    known.__dict__["seen"] = []
    return student_of(known, recipe.lora), game, batch


# Levels ------------------------------------------------------------------------------------------


def test_the_student_is_trained_at_three_of_four_levels_of_the_grid() -> None:
    sigmas = sigma_grid(SfvSpec(), 4)
    low, high = 0.002 ** (1 / 7), 700 ** (1 / 7)
    by_hand = [(low + i / 3 * (high - low)) ** 7 for i in range(4)]
    np.testing.assert_allclose(sigmas.numpy(), by_hand, rtol=1e-12)
    assert sigmas.tolist() == pytest.approx([0.002, 2.27, 70.5, 700], rel=2e-3)
    assert training_times(SfvSpec()) == pytest.approx([0.694, 0.986, 1.0], abs=5e-4)
    assert training_times(SfvSpec())[-1] == 1.0


@pytest.mark.parametrize(
    ("p_mean", "quantiles"),
    [
        (-2.0, (0.027, 0.070, 0.136, 0.269, 0.70)),
        (-1.0, (0.071, 0.189, 0.369, 0.725, 1.93)),
        (0.0, (0.20, 0.52, 1.0, 1.98, 5.2)),
        (1.0, (0.53, 1.4, 2.7, 5.4, 14.0)),
    ],
)
def test_quantiles_of_the_judged_levels(p_mean: float, quantiles: Sequence[float]) -> None:
    """exp(P_mean + z |P_std|) with the normal's quantiles z, up to the grid's fineness."""
    spec = SfvSpec(p_mean=p_mean)
    reached, sigmas = level_weights(spec).cumsum(0), sigma_grid(spec, spec.judged_levels)
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    found = sigmas[torch.searchsorted(reached, shares)]
    assert found.tolist() == pytest.approx(quantiles, rel=0.03)


def test_the_sign_of_p_std_cancels_and_equation_7_is_as_written() -> None:
    spec = SfvSpec(judged_levels=6)
    weights = level_weights(spec)
    assert torch.equal(weights, level_weights(replace(spec, p_std=1.0)))
    sigmas = sigma_grid(spec, 6).tolist()
    z = [math.erf((math.log(s) + 1) / (math.sqrt(2) * -1)) for s in sigmas]
    mass = [0.0] + [z[i - 1] - z[i] for i in range(1, 6)]
    assert weights.tolist() == pytest.approx([m / sum(mass) for m in mass])
    assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1)


def test_levels_are_drawn_as_often_as_they_should_be() -> None:
    """2000 samples: three levels alike, sigma' log-normal, the two independent."""
    _, game, _ = game_of()
    many = KeyBatch(torch.zeros(1, 2000, 1, 1, 1, 1), (0.0,), tiny.condition(1),
                    torch.zeros(2000, 1, 1, 1, 1), torch.zeros(2000), key="7/3")  # fmt: skip
    drawn = game.draw(many)
    counts = [(drawn.t - t).abs().lt(1e-6).sum().item() for t in training_times(SfvSpec())]
    assert sum(counts) == 2000 and min(counts) > 580
    log_sigma = (drawn.judged / (1 - drawn.judged)).log()
    assert log_sigma.mean().item() == pytest.approx(-1, abs=0.1)
    assert log_sigma.std().item() == pytest.approx(1, abs=0.1)
    assert torch.corrcoef(torch.stack([drawn.t, log_sigma]))[0, 1].abs() < 0.1
    again = game.draw(many)
    assert torch.equal(again.t, drawn.t) and torch.equal(again.judged, drawn.judged)


def test_ladd_judges_at_logit_normal_times_and_ufogen_at_the_next_key_time() -> None:
    u = torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64)
    expected = torch.sigmoid(torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(logit_normal(u, 1.0, 2.0), expected)
    batch = batch_of(64)
    drawn = game_of(LADD)[1].draw(batch)
    assert {round(t, 4) for t in drawn.t.tolist()} == {1.0, 0.6}
    assert len(set(drawn.judged.tolist())) == 64
    drawn = game_of(UFOGEN)[1].draw(batch)
    pairs = torch.stack([drawn.t, drawn.judged], dim=1).double().round(decimals=4).tolist()
    assert {tuple(pair) for pair in pairs} == {(1.0, 0.6), (0.6, 0.0)}


# Losses ------------------------------------------------------------------------------------------


def test_pseudo_huber_against_numpy() -> None:
    made, real = tiny.latents(3, seed=1), tiny.latents(3, seed=2)
    x, y = (v.double().numpy().reshape(3, -1) for v in (made, real))
    for c in (1e-3, 0.5):
        mean = np.sqrt(((x - y) ** 2).mean(1) + c**2) - c
        norm = np.sqrt(((x - y) ** 2).sum(1) + c**2) - c
        assert pseudo_huber(made, real, c).item() == pytest.approx(mean.mean(), rel=1e-5)
        assert pseudo_huber(made, real, c, "sum").item() == pytest.approx(norm.mean(), rel=1e-5)
    assert pseudo_huber(real, real, 1e-3).item() == 0
    leaf = made.clone().requires_grad_()
    pseudo_huber(leaf, real, 1e-3).backward()
    assert leaf.grad is not None and (leaf.grad * (made - real)).min() >= 0  # towards the real


def terms_of(recipe: Recipe) -> tuple[list[Term], RenoisedGame, KeyBatch, Student]:
    student, game, batch = game_of(recipe)
    return list(game(student, batch, 0)), game, batch, student


@pytest.mark.parametrize("recipe", [SFV, LADD, UFOGEN], ids=["sf_v", "ladd", "ufogen"])
def test_the_terms_are_the_equations(recipe: Recipe) -> None:
    """Eq. 8 to 11 by a plain loop over one sample at a time, with the sign of the logits turned."""
    terms, game, batch, student = terms_of(recipe)
    drawn, x_0 = game.draw(batch), batch.latents[0]
    noise = {name: batch.noise(name) for name in ("real", "fake")}
    fakes, reals, made = [], [], []
    for i in range(4):
        t, s = float(drawn.t[i]), float(drawn.judged[i])
        cond = batch.cond.select(i)
        x_t = (1 - t) * x_0[i : i + 1] + t * batch.z[i : i + 1]
        made.append(x_t - t * student.velocity(x_t, t, cond))
        told = torch.tensor([s])
        for found, x in ((fakes, made[-1]), (reals, x_0[i : i + 1])):
            eps = noise["fake" if found is fakes else "real"][i : i + 1]
            seen = game.teacher.features((1 - s) * x + s * eps, s, cond, game.heads.blocks[0])
            found.append(game.heads(0, seen, cond, told))
    each = range(len(fakes[0]))  # heads
    d_fake = [torch.cat([one[h] for one in fakes]) for h in each]
    d_real = [torch.cat([one[h] for one in reals]) for h in each]
    adversarial = sum(-d.mean() for d in d_fake) / len(each)
    hinge = sum(
        F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(d_real, d_fake, strict=True)
    ) / len(each)
    clean = torch.cat(made)
    recon = {
        "sf_v": 0.1 * pseudo_huber(clean, x_0, 1e-3),
        "ladd": torch.zeros(()),
        "ufogen": (clean - x_0).square().mean(),
    }[recipe.method]
    assert [term.name for term in terms] == ["student", "discriminator"]
    assert [term.trains_heads for term in terms] == [False, True]
    torch.testing.assert_close(terms[0].loss, adversarial + recon, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms[1].loss, hinge, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        terms[0].figures["generator"], torch.as_tensor(adversarial).detach(), rtol=0, atol=1e-4
    )


def test_at_the_highest_level_the_student_sees_noise_alone() -> None:
    student, game, batch = game_of()
    other = replace(batch, latents=batch.latents + 100)
    ones = torch.ones(4)
    made, again = (game.predict(student, each, ones) for each in (batch, other))
    assert torch.equal(made, again)
    torch.testing.assert_close(made, batch.z - student.velocity(batch.z, 1.0, batch.cond))


def test_real_and_fake_get_their_own_noise_at_one_level() -> None:
    _, game, batch = game_of()
    list(game(student_of(game.teacher), batch, 0))
    (fake, t_fake, blocks), (real, t_real, same) = game.teacher.__dict__["seen"]
    drawn = game.draw(batch)
    assert torch.equal(t_fake, t_real) and torch.equal(t_real, drawn.judged)
    assert blocks == same == (0, 1, 2, 3)
    level = drawn.judged.reshape(-1, 1, 1, 1, 1)
    eps = (real - (1 - level) * batch.latents[0]) / level
    torch.testing.assert_close(eps, batch.noise("real"), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(batch.noise("real"), batch.noise("fake"))


def test_parts_of_a_batch_draw_what_the_whole_draws() -> None:
    _, game, batch = game_of()
    whole, parts = game.draw(batch), [game.draw(part) for part in batch.split(2)]
    for name in ("t", "judged"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name))
    noise = torch.cat([part.noise("fake") for part in batch.split(4)])
    assert torch.equal(noise, batch.noise("fake"))


# Gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("r1", ["features", "approximate"])
@pytest.mark.parametrize("recipe", [SFV, LADD, UFOGEN], ids=["sf_v", "ladd", "ufogen"])
def test_each_side_trains_its_own_and_the_encoder_nothing(recipe: Recipe, r1: str) -> None:
    student, game, batch = game_of(replace(recipe, r1=r1, r1_weight=1.0))
    roles = {
        False: Role(student.trainable(), 1e-3, (0.5, 0.999), recipe),
        True: Role(dict(game.heads.named_parameters()), 1e-3, (0.5, 0.999), recipe),
    }
    terms = game(student, batch, 0)
    generator = next(terms)
    roles[False].backward(generator.loss)
    assert all(p.grad is not None and p.grad.any() for p in student.trainable().values())
    assert all(p.grad is None for p in game.heads.parameters())
    kept = {name: p.grad.clone() for name, p in student.trainable().items() if p.grad is not None}
    roles[True].backward(next(terms).loss)
    for p in game.heads.parameters():
        # Within its margins the hinge leaves a head's last bias alone.
        assert p.grad is not None and (p.grad.any() or p.numel() == 1)
    for name, p in student.trainable().items():
        assert p.grad is not None and torch.equal(p.grad, kept[name])
    assert all(p.grad is None and not p.requires_grad for p in game.teacher.module.parameters())


def test_further_updates_of_the_heads_leave_the_student_alone() -> None:
    student, game, batch = game_of(replace(SFV, head_updates=3))
    assert [phase.draw for phase in game.phases] == ["heads/1", "heads/2", ""]
    (term,) = game.heads_alone(student, batch, 0)
    assert term.loss.item() == pytest.approx(list(game(student, batch, 0))[-1].loss.item())
    term.loss.backward()
    assert all(p.grad is None for p in student.trainable().values())


class Shift(analytic.GaussianFlow):
    """A Gaussian flow whose predicted x_0 is off by `offset`."""

    def __init__(self) -> None:
        super().__init__(0.5, 0.25)
        self.offset = nn.Parameter(torch.tensor(0.0))

    def flow(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return super().flow(x, t, cond) - self.offset / t


def test_the_game_moves_predictions_towards_the_data() -> None:
    """Data N(1/2, 1/16); a student that is off by 1 is drawn back by the adversarial term alone."""
    teacher = analytic.analytic_model(Shift(), torch.float32)
    student = student_of(teacher, lora=None)
    offset = student.trainable()["offset"]
    others = [p for p in student.trainable().values() if p is not offset]
    for p in others:
        p.requires_grad_(False)
    with torch.no_grad():
        for name, p in student.model.module.named_parameters():
            p.copy_({"mean": 0.5, "std": 0.25, "offset": 1.0}[name] * torch.ones(()))
    recipe = replace(SFV, sf_v=SfvSpec(recon_weight=0.0), head_kind="spatial", lora=None)
    noise = torch.randn(16, 2, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = KeyBatch((0.5 + 0.25 * noise)[None], (0.0,), analytic.condition(16),
                     torch.randn(16, 2, 2, 2, 2, generator=torch.Generator().manual_seed(1)),
                     torch.zeros(16), key="0")  # fmt: skip
    setting = Setting(recipe, teacher, (1.0, 0.0), lambda _count: batch)
    game = METHODS["sf_v"].build(setting)
    assert isinstance(game, RenoisedGame)
    roles = {
        False: Role({"offset": offset}, 1e-2, (0.5, 0.999), recipe),
        True: Role(dict(game.heads.named_parameters()), 1e-2, (0.5, 0.999), recipe),
    }
    for step in range(40):
        for term in game(student, replace(batch, key=f"0/{step}"), 0):
            if term.trains_heads or step >= 15:
                roles[term.trains_heads].backward(term.loss)
                roles[term.trains_heads].step(1.0)
    assert abs(offset.item()) < 0.9


# Heads -------------------------------------------------------------------------------------------


def test_four_even_blocks_or_all_of_fewer() -> None:
    assert even_blocks(4) == (0, 1, 2, 3) and even_blocks(2) == (0, 1)
    assert even_blocks(60) == (14, 29, 44, 59)
    for count in range(1, 61):
        blocks = even_blocks(count)
        assert len(set(blocks)) == len(blocks) == min(4, count) and blocks[-1] == count - 1


class Pyramid(nn.Module):
    """An encoder whose blocks differ in grid and width, as a UNet's do, and a way back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2 if b > 8 else 1, padding=1) for a, b in ((2, 8), (8, 12))
        )
        self.up = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor, t: Tensor, _cond: Condition) -> Tensor:
        h = x.transpose(1, 2).flatten(0, 1) + t.repeat_interleave(x.shape[2]).reshape(-1, 1, 1, 1)
        for block in self.down:
            h = torch.tanh(block(h))
        v = F.interpolate(self.up(h), size=x.shape[-2:])
        return v.unflatten(0, (len(x), -1)).transpose(1, 2)


PYRAMID = replace(
    analytic.ANALYTIC,
    blocks=lambda module: list(module.get_submodule("down").children()),
    tail=lambda module: module.get_submodule("up"),
    tokens=lambda _module, output, shape: output.unflatten(0, (shape[0], -1)).movedim(2, -1),
)


def test_blocks_of_different_grids_and_widths_are_judged() -> None:
    torch.manual_seed(0)
    network = Pyramid().eval().requires_grad_(False)
    teacher = VideoModel(network, PYRAMID, analytic.SPEC, source="pyramid")
    x = torch.randn(2, 3, 2, 3, 8, 6)  # real latents and noise: [3, 2, 3, 8, 6] each
    batch = KeyBatch(x[:1], (0.0,), analytic.condition(3), x[1], torch.zeros(3), key="1")
    found = teacher.features(x[1], 0.5, batch.cond, (0, 1))
    assert [tuple(f.shape) for f in found] == [(3, 3, 8, 6, 8), (3, 3, 4, 3, 12)]
    student, game, _ = game_of(replace(SFV, lora=None), teacher, batch)
    assert len(game.heads.of(0)) == 4  # a spatial and a temporal one for each block
    for term in game(student, batch, 0):
        assert torch.isfinite(term.loss)
        term.loss.backward(retain_graph=True)
    assert all(p.grad is not None for p in game.heads.parameters())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("spatial", {"k0_block1"}),
        ("temporal", {"k0_block1_temporal"}),
        ("spatial_temporal", {"k0_block1", "k0_block1_temporal"}),
    ],
)
def test_kinds_of_heads(kind: str, names: set[str]) -> None:
    heads = Heads(((1,),), {1: 6}, replace(SFV, head_kind=kind), 5)
    assert set(heads.heads) == names
    x = torch.randn(2, 3, 4, 4, 6)
    cond = Condition(torch.randn(2, 4, 10), None, torch.randn(2, 5))
    assert len(heads(0, [x], cond)) == len(names)


def test_heads_are_told_the_noise_level() -> None:
    cond, t = tiny.condition(3), torch.tensor([0.1, 0.5, 0.5])
    vector = condition_vector(cond, t)
    torch.testing.assert_close(vector[:, :-8], prompt_vector(cond))
    angles = np.pi * t.numpy()[:, None] * np.array([1, 2, 4, 8])
    code = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    torch.testing.assert_close(vector[:, -8:], torch.tensor(code, dtype=torch.float32))
    assert torch.equal(time_code(t)[1], time_code(t)[2])
    _, game, batch = game_of()
    seen = game.features(batch.latents[0], "real", torch.full((4,), 0.3), batch)
    told = [game.heads(0, seen, batch.cond, torch.full((4,), s)) for s in (0.3, 0.9)]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(*told, strict=True))


def test_a_teacher_of_two_networks_is_refused() -> None:
    teacher = tiny_wan.video_model("wan22_t2v")
    setting = Setting(SFV, teacher, TIMES, lambda _count: batch_of())
    with pytest.raises(AccVideoError, match="SF-V judges at times that fall to both"):
        METHODS["sf_v"].build(setting)


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (SfvSpec, {"levels": 1}, "recipe.sf_v.levels is 1; it must be at least 2"),
        (SfvSpec, {"sigma_max": 0.001}, "recipe.sf_v.sigma_min is 0.002; it must be below"),
        (SfvSpec, {"p_std": 0.0}, "recipe.sf_v.p_std is 0"),
        (SfvSpec, {"recon_norm": "l1"}, "recon_norm is 'l1'; choose one of mean, sum"),
        (SfvSpec, {"huber_c": 0.0}, "recipe.sf_v.huber_c is 0.0; it must be positive"),
        (LaddSpec, {"std": -1.0}, "recipe.ladd.std is -1.0; it must be positive"),
        (UfogenSpec, {"recon_weight": -1.0}, "recipe.ufogen.recon_weight is -1.0; it must be at"),
    ],
)
def test_values_out_of_range_are_named(spec: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(AccVideoError, match=message):
        spec(**change)
