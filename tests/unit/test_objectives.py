"""Eq. 6, Eq. 7-8 and Algorithm 1 against closed forms and numbers worked by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import analytic
import pytest
import tiny
import tiny_wan
import torch
from torch import Tensor, nn

from accvideo_core.conditioning import Condition
from accvideo_core.distill.adversarial import (
    Adversarial,
    build_adversarial,
    check_features,
    feature_blocks,
)
from accvideo_core.distill.batch import KeyBatch
from accvideo_core.distill.gan import GAN_LOSSES, gradient_penalty
from accvideo_core.distill.optimiser import Role, lr_factor
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.rollout import generate
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.distill.trajectory import trajectory_loss
from accvideo_core.errors import AccVideoError
from accvideo_core.models import VideoModel

TIMES = (1.0, 0.9, 0.6, 0.0)
SHAPE = (2, 2, 2, 2)


class Table(nn.Module):
    """A student whose velocity is a free value per sample, element and key time."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(len(TIMES) - 1, *shape))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.v[TIMES.index(round(float(t[0]), 6))]


class Affine(nn.Module):
    """A student v = slope x + offset, one pair per key time."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(len(TIMES) - 1))
        self.offset = nn.Parameter(torch.zeros(len(TIMES) - 1))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        i = TIMES.index(round(float(t[0]), 6))
        return self.slope[i] * x + self.offset[i]


def student_of(module: nn.Module, teacher: VideoModel) -> Student:
    info = StudentInfo(
        family="analytic",
        base=teacher.fingerprint,
        key_times=TIMES,
        guidance=None,
        lora=None,
        latent_spec=analytic.SPEC,
        frames=5,
        height=16,
        width=16,
    )
    return Student(VideoModel(module, analytic.ANALYTIC, analytic.SPEC), info, teacher)


def exact_batch(state: Callable[[Tensor, float], Tensor], size: int = 16) -> KeyBatch:
    """Key states by the exact solution `state`(x_1, t), not by any recorder."""
    x_1 = torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(3))
    z = torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(4))
    latents = torch.stack([state(x_1, t) for t in TIMES[::-1]]).float()
    u = torch.rand(size, generator=torch.Generator().manual_seed(5))
    return KeyBatch(latents, TIMES[::-1], analytic.condition(size), z, u)


def minimise(student: Student, batch: KeyBatch) -> None:
    optimizer = torch.optim.LBFGS(
        student.trainable().values(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(trajectory_loss(student, batch, k) for k in range(batch.steps))
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)  # pyright: ignore


def test_trajectory_loss_is_equation_6() -> None:
    batch = exact_batch(analytic.exact_gaussian_state)
    student = student_of(Affine(), analytic.gaussian_model())
    with torch.no_grad():
        student.model.module.offset.copy_(torch.tensor([0.1, 0.2, 0.3]))  # pyright: ignore
    for k, offset in ((2, 0.1), (1, 0.2), (0, 0.3)):
        l_k, l_next, t = batch.latents[k], batch.latents[k + 1], batch.t
        target = (l_k - l_next) / (t[k] - t[k + 1])
        expected = float((offset - target).square().mean())
        assert trajectory_loss(student, batch, k).item() == pytest.approx(expected, rel=1e-5)
    assert batch.t == (0.0, 0.6, 0.9, 1.0)


def test_minimiser_on_the_gaussian_flow_is_its_average_velocity() -> None:
    """x_t = (1-t) mean + s_t x_1 makes the average velocity affine in x_{t'_{k+1}}."""
    mean, std = 0.5, 0.25
    student = student_of(Affine(), analytic.gaussian_model(mean, std))
    minimise(student, exact_batch(analytic.exact_gaussian_state))
    for i, (t, t_next) in enumerate(zip(TIMES, TIMES[1:], strict=False)):
        s, s_next = (math.hypot((1 - u) * std, u) for u in (t, t_next))
        slope = (s_next / s - 1) / (t_next - t)
        offset = mean * ((1 - t_next) - s_next / s * (1 - t)) / (t_next - t)
        assert student.trainable()["slope"][i].item() == pytest.approx(slope, abs=1e-4)
        assert student.trainable()["offset"][i].item() == pytest.approx(offset, abs=1e-4)


def test_minimiser_on_the_mixture_lands_on_the_two_points() -> None:
    batch = exact_batch(analytic.exact_mixture_state)
    student = student_of(Table(batch.z.shape), analytic.mixture_model())
    minimise(student, batch)
    x_1 = batch.latents[-1]
    for i, (t, t_next) in enumerate(zip(TIMES, TIMES[1:], strict=False)):
        there, here = (analytic.exact_mixture_state(x_1, u) for u in (t_next, t))
        expected = ((there - here) / (t_next - t)).float()
        torch.testing.assert_close(student.trainable()["v"][i], expected, rtol=0, atol=2e-4)
    x = x_1
    for t, t_next in zip(TIMES, TIMES[1:], strict=False):
        x = x + (t_next - t) * student.velocity(x, t, batch.cond)
    torch.testing.assert_close(x, torch.sign(x_1), rtol=0, atol=1e-3)


def test_gan_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0]), torch.tensor([-1.0])
    logistic, hinge = GAN_LOSSES["logistic"], GAN_LOSSES["hinge"]
    # softplus(-2) = .1269280, softplus(-1) = .3132617, softplus(1) = 1.3132617
    assert float(logistic.discriminator(real, fake)) == pytest.approx(0.4401897, abs=1e-6)
    assert float(logistic.generator(fake)) == pytest.approx(1.3132617, abs=1e-6)
    zero = torch.zeros(3)
    assert float(logistic.discriminator(zero, zero)) == pytest.approx(2 * math.log(2))
    assert float(hinge.discriminator(real, fake)) == 0.0
    half = torch.tensor([0.5, 0.5])
    assert float(hinge.discriminator(half, half)) == pytest.approx(0.5 + 1.5)
    assert float(hinge.generator(torch.tensor([0.5, -2.0]))) == pytest.approx(0.75)


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_gan_gradients_have_the_right_sign(name: str) -> None:
    """The student raises D(fake), also where D is sure; D raises D(real) and lowers D(fake)."""
    gan = GAN_LOSSES[name]
    fake, real = torch.tensor([-9.0, 0.0], requires_grad=True), torch.zeros(2, requires_grad=True)
    gan.generator(fake).backward()
    assert fake.grad is not None and (fake.grad < -0.2).all()
    fake.grad = None
    gan.discriminator(real, fake).backward()
    assert real.grad is not None and (real.grad < 0).all() and fake.grad[1] > 0


def test_generate_is_euler_from_fresh_noise_with_gradient_through_its_last_step() -> None:
    batch = exact_batch(analytic.exact_gaussian_state)
    student = student_of(Affine(), analytic.gaussian_model())
    with torch.no_grad():
        student.model.module.slope.copy_(torch.tensor([0.3, -0.2, 0.5]))  # pyright: ignore
        student.model.module.offset.fill_(0.1)  # pyright: ignore
    slopes = [0.3, -0.2, 0.5]
    x = batch.z
    for step, k in enumerate((2, 1, 0)):
        t, t_next = TIMES[step], TIMES[step + 1]
        fake = generate(student, batch, k)
        expected = x + (t_next - t) * (slopes[step] * x + 0.1)
        torch.testing.assert_close(fake, expected)
        gradient = torch.autograd.grad(fake.sum(), student.trainable()["slope"])[0]
        by_hand = torch.zeros(3)
        by_hand[step] = ((t_next - t) * x).sum()  # d/dslope of the last step alone
        torch.testing.assert_close(gradient, by_hand)
        x = expected


class Spy(VideoModel):
    """Writes down what it is asked for."""

    def features(self, x_t, t, cond, blocks):  # type: ignore[no-untyped-def]
        seen = self.__dict__.setdefault("seen", [])
        seen.append((x_t.detach().clone(), t, cond, tuple(blocks)))
        return VideoModel.features(self, x_t, t, cond, blocks)


def tiny_game(recipe: Recipe) -> tuple[Student, Adversarial, KeyBatch]:
    """LoRA student, objective and batch on a random HunyuanVideo."""
    plain = tiny.video_model()
    teacher = Spy(plain.module, plain.family, plain.latent_spec)
    info = StudentInfo(
        family="hunyuan_video",
        base=teacher.fingerprint,
        key_times=TIMES,
        guidance=6.0,
        lora=LoraSpec(rank=4),
        latent_spec=tiny.SPEC,
        frames=5,
        height=16,
        width=16,
    )
    student = Student.create(teacher, info)
    with torch.no_grad():
        for name, p in student.trainable().items():
            if ".lora_B." in name:
                p.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    states = torch.stack([tiny.latents(4, seed=s) for s in range(len(TIMES))])
    u = torch.tensor([0.1, 0.3, 0.6, 0.9])
    batch = KeyBatch(states, TIMES[::-1], tiny.condition(4), tiny.latents(4, seed=9), u)
    return student, build_adversarial(recipe, teacher, batch), batch


def roles_of(student: Student, game: Adversarial) -> dict[bool, Role]:
    return {
        False: Role(student.trainable(), 1e-3, (0.9, 0.999), game.recipe),
        True: Role(dict(game.heads.named_parameters()), 1e-3, (0.0, 0.999), game.recipe),
    }


def test_the_discriminator_sees_key_latents_as_they_are() -> None:
    """Eq. 8: teacher features at t'_k, of the latents themselves, for real and fake alike."""
    student, game, batch = tiny_game(Recipe(student_steps=3, head_width=16, adversarial=True))
    assert game.heads.blocks == ((2,), (3,), (3,))  # 2/3 of 4 blocks at t = 0, else the last
    for k in range(3):
        seen = game.teacher.__dict__["seen"] = []
        list(game(student, batch, k))
        (fake, t_fake, cond_fake, blocks_fake), (real, t_real, cond_real, blocks_real) = seen
        torch.testing.assert_close(fake, generate(student, batch, k).detach())
        assert torch.equal(real, batch.latents[k])
        assert t_fake == t_real == batch.t[k] == TIMES[::-1][k]
        assert cond_fake is cond_real is batch.cond
        assert blocks_fake == blocks_real == game.heads.blocks[k]


@pytest.mark.parametrize("gan_loss", ["logistic", "hinge"])
def test_gradients_reach_student_and_the_heads_of_k_only(gan_loss: str) -> None:
    recipe = Recipe(student_steps=3, head_width=16, gan_loss=gan_loss, r1_weight=1.0)
    student, game, batch = tiny_game(recipe)
    for k in range(3):
        roles = roles_of(student, game)
        before = {name: p.clone() for name, p in game.heads.named_parameters()}
        for term in game(student, batch, k):
            grads = [p.grad is not None for p in game.heads.parameters()]
            roles[term.trains_heads].backward(term.loss * term.weight)
            if not term.trains_heads:  # the student's terms leave the heads alone
                assert [p.grad is not None for p in game.heads.parameters()] == grads
        for name, p in student.trainable().items():
            assert p.grad is not None and p.grad.abs().max() > 0, name
        mine = {id(p) for head in game.heads.of(k) for p in head.parameters()}
        for name, p in game.heads.named_parameters():
            assert (p.grad is not None) == (id(p) in mine), name
        roles[True].step(1.0)
        changed = {id(p) for n, p in game.heads.named_parameters() if not torch.equal(p, before[n])}
        assert changed and changed <= mine
        for p in student.trainable().values():
            p.grad = None
    for p in game.teacher.module.parameters():
        assert p.grad is None and not p.requires_grad


def test_terms_and_figures() -> None:
    recipe = Recipe(student_steps=3, head_width=16, adv_weight=0.3, trajectory_weight=2.0)
    student, game, batch = tiny_game(recipe)
    terms = list(game(student, batch, 1))
    assert [(t.name, t.weight, t.trains_heads) for t in terms] == [
        ("trajectory", 2.0, False),
        ("generator", 0.3, False),
        ("discriminator", 1.0, True),
    ]
    assert terms[0].loss.item() == pytest.approx(trajectory_loss(student, batch, 1).item())
    figures = terms[2].figures
    assert set(figures) == {"real_accuracy", "fake_accuracy"}
    assert all(0 <= float(x) <= 1 for x in figures.values())


def test_feature_blocks_of_the_recipe_win() -> None:
    teacher = tiny.video_model()
    assert feature_blocks(Recipe(), teacher, (0.0, 0.5, 1.0)) == [(2,), (3,)]
    chosen = Recipe(feature_blocks=(1, 3))
    assert feature_blocks(chosen, teacher, (0.0, 0.5, 1.0)) == [(1, 3), (1, 3)]
    student, game, batch = tiny_game(replace(chosen, student_steps=3, head_width=16))
    assert all(torch.isfinite(term.loss) for term in game(student, batch, 0))


def test_clean_latents_can_be_shown_at_drawn_times() -> None:
    recipe = Recipe(student_steps=3, head_width=16, clean_time_shift=12.0)
    _, game, batch = tiny_game(recipe)
    drawn = game.feature_time(batch, 0)
    expected = [12 * u / (1 + 11 * u) for u in batch.u.tolist()]
    torch.testing.assert_close(drawn, torch.tensor(expected))
    assert game.feature_time(batch, 1) == batch.t[1]
    game.features(batch.latents[0], batch, 0)


def test_smoothness_is_the_squared_change_of_logits() -> None:
    recipe = Recipe(student_steps=3, head_width=16, r1_weight=1.0, r1_sigma=0.2)
    _, game, batch = tiny_game(recipe)
    real, near = (
        game.heads(1, game.features(x, batch, 1), batch.cond)
        for x in (batch.latents[1], batch.latents[1] + 0.2 * batch.z)
    )
    expected = (near[0] - real[0]).square().mean().item()
    assert game.smoothness(real, batch, 1).item() == pytest.approx(expected, rel=1e-5)


class Linear(nn.Module):
    """A head whose logits are <w, standardised token>, one for each token."""

    def __init__(self, std: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return ((x / self.std) @ self.w).flatten(1)


def test_the_gradient_penalty_of_a_linear_head_is_its_squared_weight() -> None:
    """R1 is || w ||^2 for D = <w, x>, whatever the scale of the features and the clip's size."""
    for std in (torch.ones(3), torch.tensor([0.1, 30.0, 2.0])):
        for size in ((2, 1, 4, 4, 3), (1, 3, 2, 5, 3)):
            head, x = Linear(std), torch.randn(size, requires_grad=True)
            penalty = gradient_penalty([head], [x], [head(x)])  # pyright: ignore
            assert penalty.item() == pytest.approx(1 + 4 + 0.25, rel=1e-5)
            penalty.backward()
            torch.testing.assert_close(head.w.grad, 2 * head.w.detach())


@pytest.mark.parametrize("kind", ["spatial", "spatial_temporal"])
def test_feature_r1_adds_the_gradient_at_real_standardised_features(kind: str) -> None:
    recipe = Recipe(student_steps=3, head_width=16, r1="features", r1_weight=0.5, head_kind=kind)
    student, game, batch = tiny_game(recipe)
    plain = replace(game, recipe=replace(recipe, r1_weight=0.0))
    with torch.no_grad():
        fake = game.features(generate(student, batch, 1), batch, 1)
        (real,) = game.features(batch.latents[1], batch, 1)
    expected = []
    for head in game.heads.of(1):
        x = ((real - head.mean) / head.std).requires_grad_()
        head = copy.deepcopy(head)
        head.mean.zero_()
        head.std.fill_(1)
        logits = head(x)
        (gradient,) = torch.autograd.grad(logits.sum(), x)
        expected.append(gradient.square().sum() / logits.numel())
    term, bare = (each.discriminator(fake, batch, 1) for each in (game, plain))
    penalty = float(torch.stack(expected).mean())
    assert penalty > 0
    assert (term.loss - bare.loss).item() == pytest.approx(0.5 * penalty, rel=1e-3)
    term.loss.backward()
    grads = [p.grad for head in game.heads.of(1) for p in head.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    assert all(p.grad is None for p in student.trainable().values())


def test_heads_judge_clips_of_another_size_than_they_were_set_up_on() -> None:
    """One row of tokens and another number of frames, through the whole objective."""
    recipe = Recipe(
        student_steps=3,
        head_width=16,
        head_kind="spatial_temporal",
        head_conditioning=True,
        r1="features",
        r1_weight=0.1,
    )
    student, game, batch = tiny_game(recipe)
    roles = roles_of(student, game)
    for frames, height, width in ((1, 2, 6), (3, 6, 4)):
        x = torch.randn(4, 4, tiny.CHANNELS, frames, height, width)
        other = replace(batch, latents=x, z=torch.randn_like(x[0]))
        for term in game(student, other, 1):
            assert torch.isfinite(term.loss)
            roles[term.trains_heads].backward(term.loss)
        for head in game.heads.of(1):
            assert all(p.grad is not None and p.grad.any() for p in head.parameters())
            head.zero_grad()


@pytest.mark.parametrize("kind", ["spatial", "spatial_temporal"])
def test_conditioned_heads_see_the_prompts_of_what_they_judge(kind: str) -> None:
    recipe = Recipe(student_steps=3, head_width=16, head_conditioning=True, head_kind=kind)
    _, game, batch = tiny_game(recipe)
    real = game.features(batch.latents[1], batch, 1)
    other = game.heads(1, real, tiny.condition(4, seed=77))
    for one, two in zip(game.heads(1, real, batch.cond), other, strict=True):
        assert not torch.allclose(one, two, atol=1e-3)


def test_phases_of_an_update() -> None:
    recipe = Recipe(student_steps=3, head_width=16)
    student, game, batch = tiny_game(recipe)

    def names(recipe: Recipe) -> list[tuple[str, list[str]]]:
        phases = replace(game, recipe=recipe).phases
        return [(p.draw, [t.name for t in p.terms(student, batch, 1)]) for p in phases]

    whole = ["trajectory", "generator", "discriminator"]
    assert names(recipe) == [("", whole)]
    assert names(replace(recipe, updates="separate")) == [("", whole[:1]), ("", whole[1:])]
    more = [("heads/1", whole[2:]), ("heads/2", whole[2:])]
    assert names(replace(recipe, head_updates=3)) == [*more, ("", whole)]


def test_further_updates_of_the_heads_leave_the_student_alone() -> None:
    student, game, batch = tiny_game(Recipe(student_steps=3, head_width=16))
    (term,) = game.heads_alone(student, batch, 1)
    assert term.loss.item() == pytest.approx(list(game(student, batch, 1))[-1].loss.item())
    term.loss.backward()
    assert all(p.grad is None for p in student.trainable().values())
    assert all(p.grad is not None for head in game.heads.of(1) for p in head.parameters())


def test_features_that_the_teacher_cannot_give_are_refused() -> None:
    teacher = tiny.video_model()
    check_features(Recipe(feature_blocks=(0, 3), clean_time_shift=12.0), teacher)
    with pytest.raises(AccVideoError, match="feature_blocks holds 4, but .* blocks are 0 to 3"):
        check_features(Recipe(feature_blocks=(0, 4)), teacher)
    experts = tiny_wan.video_model("wan22_t2v")
    with pytest.raises(AccVideoError, match="clean_time_shift is 12.0, whose times fall to both"):
        check_features(Recipe(clean_time_shift=12.0), experts)


def test_the_adversarial_term_moves_fakes_towards_real_ones() -> None:
    """Real clips lie around +1 and fakes around -1; D learns that and lifts the fakes."""
    teacher = analytic.gaussian_model()
    student = student_of(Affine(), teacher)
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    batch = replace(
        exact_batch(analytic.exact_gaussian_state),
        latents=(1 + noise).expand(4, *noise.shape),
    )
    with torch.no_grad():
        student.model.module.offset[2] = 1 / 0.6  # pyright: ignore - the last step subtracts 1
    game = build_adversarial(Recipe(student_steps=3, head_width=16), teacher, batch)
    roles = roles_of(student, game)
    before = generate(student, batch, 0).mean().item()
    for _ in range(60):
        term = list(game(student, batch, 0))[-1]
        roles[True].backward(term.loss)
        roles[True].step(10.0)
    assert term.figures["real_accuracy"] > 0.8 and term.figures["fake_accuracy"] > 0.8
    for _ in range(20):
        roles[False].backward(list(game(student, batch, 0))[1].loss)
        roles[False].step(10.0)
    after = generate(student, batch, 0).mean().item()
    assert before == pytest.approx(-1, abs=0.2) and after > before + 0.05


def test_learning_rate_schedules() -> None:
    recipe = Recipe(train_steps=100, warmup=10)
    assert lr_factor(recipe, 0) == pytest.approx(0.1)
    assert lr_factor(recipe, 9) == lr_factor(recipe, 99) == 1.0
    linear, cosine = replace(recipe, schedule="linear"), replace(recipe, schedule="cosine")
    assert lr_factor(linear, 75) == pytest.approx(0.25)
    assert lr_factor(cosine, 50) == pytest.approx(0.5)
    assert lr_factor(cosine, 75) == pytest.approx((1 - math.sqrt(0.5)) / 2)
