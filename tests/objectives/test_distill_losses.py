"""Losses of distillation are trl's and the formulas of their papers in torch: values and gradients, a row a variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from postrain.config import DistillSection
from postrain.objectives.distill import DIVERGENCES, compare_with_logits, compare_with_top, match_rows
from postrain.objectives.logprobs import map_logits

SHAPE, EMBED, TEACHER_EMBED = (3, 29), 24, 17
# Rows of the student, of the teacher, ids that both have; each padded further inside.
VOCAB, TEACHER_VOCAB, SHARED = 301, 330, 290
CAP = 9.0  # of the teacher's logits


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape, scale=1.0: (scale * rng.standard_normal(shape)).astype(np.float32)
    student = draw(*SHAPE, EMBED), draw(320, EMBED, scale=0.5)
    teacher = draw(*SHAPE, TEACHER_EMBED), draw(384, TEACHER_EMBED, scale=0.5)
    student[1][VOCAB:], teacher[1][TEACHER_VOCAB:] = 7.0, 7.0  # whatever stands in the padding must not matter
    targets = rng.integers(0, VOCAB, SHAPE).astype(np.int32)
    weights = ((rng.random(SHAPE) < 0.6) * rng.choice([1.0, 0.5], SHAPE)).astype(np.float32)
    weights[1] = 0
    return student, teacher, targets, weights


def run_live(arrays, chunk=16, shared=SHARED, **options):
    """(weighted sum of the losses, gradients of hidden states and unembedding, metrics)."""
    (hidden, table), teacher, targets, weights = arrays
    values = compare_with_logits(DistillSection(**options), shared, CAP)
    rows = targets, jnp.asarray(teacher[0])
    return run(values, hidden, table, rows, match_rows(jnp.asarray(teacher[1]), len(table)), weights, chunk)


def run_stored(arrays, ids, logprobs, chunk=16, shared=SHARED, **options):
    (hidden, table), _, targets, weights = arrays
    values = compare_with_top(DistillSection(**options), shared)
    return run(values, hidden, table, (targets, jnp.asarray(ids), jnp.asarray(logprobs)), (), weights, chunk)


def run(values, hidden, table, rows, shared, weights, chunk):
    def total(hidden, table):
        found = map_logits(values, hidden, table, weights, rows, shared, vocab_size=VOCAB, chunk=chunk)
        return (found["loss"] * weights).sum(), found

    (loss, found), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, table)
    return float(loss), [np.asarray(grad) for grad in grads], {name: np.asarray(x) for name, x in found.items()}


def teacher_logits_of(arrays):
    (hidden, table) = arrays[1]
    logits = torch.from_numpy(hidden) @ torch.from_numpy(table).T
    return CAP * torch.tanh(logits / CAP)


def in_torch(arrays, token_loss):
    """``token_loss(student logits [N, SHARED], teacher logits [N, SHARED]) -> [N]`` of the trained tokens."""
    (hidden, table), _, targets, weights = arrays
    hidden, table = (torch.from_numpy(x).clone().requires_grad_() for x in (hidden, table))
    logits, trained = hidden @ table[:VOCAB].T, torch.from_numpy(weights) > 0
    nll = torch.nn.functional.cross_entropy(
        logits[trained], torch.from_numpy(targets).long()[trained], reduction="none"
    )
    losses = token_loss(logits[trained][:, :SHARED], teacher_logits_of(arrays)[trained][:, :SHARED], nll)
    loss = (losses * torch.from_numpy(weights)[trained]).sum()
    loss.backward()
    return loss.item(), [hidden.grad.numpy(), table.grad.numpy()]


def assert_near(found, expected, tolerance=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for grad, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(grad, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def of_trl(beta, temperature=1.0):
    def token_loss(student, teacher, nll):
        each = [
            GKDTrainer.generalized_jsd_loss(s[None], t[None], beta=beta, temperature=temperature, reduction="sum")
            for s, t in zip(student, teacher, strict=True)
        ]
        return torch.stack(each)

    return token_loss


def skew(student, teacher, forward):
    """DistiLLM's, eq. 4 and 5, with a = 0.25, at temperature 1.5."""
    p, q = (teacher / 1.5).softmax(-1), (student / 1.5).softmax(-1)
    first, other = (p, q) if forward else (q, p)
    return (first * (first / (0.25 * first + 0.75 * other)).log()).sum(-1)


def mixed(student, teacher, nll):
    return of_trl(0.0, 2.0)(student, teacher, nll) + 0.3 * nll


VARIANTS = {
    "forward KL": (of_trl(0.0), {"loss": "forward_kl"}),
    "forward KL, softened": (of_trl(0.0, 2.0), {"loss": "forward_kl", "temperature": 2.0}),
    "reverse KL": (of_trl(1.0), {"loss": "reverse_kl"}),
    "reverse KL, sharpened": (of_trl(1.0, 0.7), {"loss": "reverse_kl", "temperature": 0.7}),
    "JSD": (of_trl(0.5), {"loss": "jsd"}),
    "JSD, uneven": (of_trl(0.1, 1.5), {"loss": "jsd", "beta": 0.1, "temperature": 1.5}),
    "skew forward KL": (
        lambda s, t, nll: skew(s, t, True),
        {"loss": "skew_forward_kl", "skew": 0.25, "temperature": 1.5},
    ),
    "skew reverse KL": (
        lambda s, t, nll: skew(s, t, False),
        {"loss": "skew_reverse_kl", "skew": 0.25, "temperature": 1.5},
    ),
    "with cross entropy": (mixed, {"temperature": 2.0, "nll_coef": 0.3}),
}


def test_a_table_gets_the_rows_of_another():
    table = jnp.arange(6.0).reshape(3, 2)
    assert match_rows(table, 2).tolist() == [[0, 1], [2, 3]] and match_rows(table, 3).tolist() == table.tolist()
    assert match_rows(table, 4).tolist() == [*table.tolist(), [0, 0]]


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_those_of_trl_and_torch(arrays, name):
    token_loss, options = VARIANTS[name]
    assert_near(run_live(arrays, **options), in_torch(arrays, token_loss))


def test_the_chunk_changes_nothing(arrays):
    options = {"loss": "jsd", "nll_coef": 0.3}
    assert_near(run_live(arrays, chunk=8, **options), run_live(arrays, chunk=1024, **options))


# --- the likeliest ids of a teacher ---


def take_top(arrays, count, temperature):
    logits = teacher_logits_of(arrays)[..., :SHARED].double()
    top = (logits / temperature).log_softmax(-1).topk(count)
    return top.indices.numpy().astype(np.int32), top.values.numpy().astype(np.float32)


@pytest.mark.parametrize(("loss", "temperature"), [("reverse_kl", 1.0), ("jsd", 1.7), ("skew_forward_kl", 1.0)])
def test_of_all_ids_they_are_the_whole_distribution(arrays, loss, temperature):
    options = {"loss": loss, "temperature": temperature, "nll_coef": 0.1}
    (live, grads, _), found = (
        run_live(arrays, **options),
        run_stored(arrays, *take_top(arrays, SHARED, temperature), **options),
    )
    assert found[0] == pytest.approx(live, rel=1e-6)
    for grad, expected in zip(found[1], grads, strict=True):
        assert np.linalg.norm(grad - expected) <= 1e-6 * np.linalg.norm(expected)


def of_bins(loss, log_p, log_q):
    """The divergences, plainly."""
    p, q = log_p.exp(), log_q.exp()
    kl = lambda a, b: (a * (a / b).log()).sum(-1)
    match loss:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "skew_reverse_kl":
            return kl(q, 0.1 * q + 0.9 * p)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "skew_reverse_kl"])
def test_the_other_ids_are_one_outcome_for_both(arrays, loss):
    """In torch: bins of probability, the last one of all other ids."""
    temperature = 1.3
    ids, logprobs = take_top(arrays, 7, temperature)
    trained = torch.from_numpy(arrays[3]) > 0
    index, known = torch.from_numpy(ids)[trained].long(), torch.from_numpy(logprobs)[trained]

    def token_loss(student, teacher, nll):
        q = (student / temperature).softmax(-1).gather(1, index)
        to_bins = lambda p: torch.cat([p, 1 - p.sum(-1, keepdim=True)], 1).log()
        return of_bins(loss, to_bins(known.exp()), to_bins(q))

    options = {"loss": loss, "temperature": temperature}
    found = run_stored(arrays, ids, logprobs, **options)
    assert_near(found, in_torch(arrays, token_loss))
    np.testing.assert_allclose(found[2]["teacher_top"][arrays[3] > 0], known.exp().sum(-1), rtol=1e-6)


def test_more_ids_tell_more_and_never_more_than_all(arrays):
    """Of every token: merging outcomes cannot raise a divergence."""
    (hidden, table), _, targets, weights = arrays
    logits, trained = jnp.asarray(hidden @ table[:VOCAB].T), weights > 0
    compare = lambda loss, rows: compare_with_top(DistillSection(loss=loss), SHARED)(logits[trained], rows, ())
    measure = jax.jit(lambda rows: jnp.stack([compare(loss, rows)["divergence"] for loss in DIVERGENCES]))
    several = []
    for count in (1, 30, SHARED):
        rows = targets[trained], *(x[trained] for x in take_top(arrays, count, 1.0))
        several.append(np.asarray(measure(rows)))
    for fewer, more in zip(several[:-1], several[1:], strict=True):
        assert (fewer <= more + 1e-6).all() and (fewer.sum(1) < more.sum(1)).all()


def test_a_certain_teacher_gives_finite_losses(arrays):
    """Its K probabilities sum to 1, or by rounding to a little more; the rest still has some mass."""
    (hidden, table), _, targets, _ = arrays
    ids, logprobs = take_top(arrays, 3, 1.0)
    rows = targets[0], ids[0], jnp.log(jnp.full_like(logprobs[0], 1.0004 / 3))

    def total(logits):
        found = [compare_with_top(DistillSection(loss=loss), SHARED)(logits, rows, ())["loss"] for loss in DIVERGENCES]
        return jnp.stack(found).sum(0).sum()

    loss, grad = jax.jit(jax.value_and_grad(total))(jnp.asarray(hidden[0] @ table[:VOCAB].T))
    assert np.isfinite(loss) and np.isfinite(grad).all() and np.abs(grad).max() > 0.01


# --- what holds of all of them ---


def test_a_student_that_is_its_own_teacher_learns_nothing(arrays):
    (hidden, table), _, targets, weights = arrays
    for loss in ("forward_kl", "jsd", "skew_reverse_kl"):
        values = compare_with_logits(DistillSection(loss=loss, temperature=1.5), VOCAB)
        rows, own = (targets, jnp.asarray(hidden)), jnp.asarray(table)
        total, grads, found = run(values, hidden, table, rows, own, weights, 16)
        assert abs(total) < 1e-5 and (found["agreement"] == (weights > 0)).all()
        assert max(np.abs(grad).max() for grad in grads) < 1e-6
    logprobs, ids = jax.lax.top_k(jax.nn.log_softmax((hidden @ table[:SHARED].T) / 1.5), 9)
    total, grads, _ = run_stored(arrays, ids, logprobs, loss="reverse_kl", temperature=1.5)
    assert abs(total) < 1e-5 and max(np.abs(grad).max() for grad in grads) < 1e-5


def test_metrics_count_what_they_say(arrays):
    (hidden, table), _, targets, weights = arrays
    _, _, found = run_live(arrays, loss="reverse_kl", nll_coef=0.5)
    logits, trained = torch.from_numpy(hidden @ table[:VOCAB].T), weights > 0
    log_p = logits.log_softmax(-1).gather(-1, torch.from_numpy(targets).long()[..., None])[..., 0]
    np.testing.assert_allclose(found["nll"], np.where(trained, -log_p, 0), rtol=1e-5)
    np.testing.assert_array_equal(found["accuracy"], trained & (logits.argmax(-1).numpy() == targets))
    best = teacher_logits_of(arrays)[..., :SHARED].argmax(-1)
    np.testing.assert_array_equal(found["agreement"], trained & (logits.argmax(-1) == best).numpy())
    np.testing.assert_allclose(found["loss"], found["divergence"] + 0.5 * found["nll"], rtol=1e-6)


def test_a_frozen_unembedding_costs_no_gradient(arrays):
    (hidden, table), _, targets, weights = arrays
    ids, logprobs = take_top(arrays, 5, 1.0)
    values = compare_with_top(DistillSection(), SHARED)

    def products(argnums):
        fn = lambda h, u: map_logits(values, h, u, weights, (targets, ids, logprobs), vocab_size=VOCAB)["loss"].sum()
        return jax.jit(jax.grad(fn, argnums)).lower(hidden, table).as_text().count("dot_general")

    assert (products((0,)), products((0, 1))) == (2, 3)


@pytest.mark.parametrize("teacher", ["live", "stored"])
def test_temporaries_at_a_large_vocabulary_are_a_fifth_of_the_naive_loss(teacher):
    """Forward and backward; the unembedding's own gradient is not counted."""
    tokens, vocab, embed, top = 1024, 151_936, 64, 8
    abstract = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    args = [abstract(tokens, embed), abstract(vocab, embed), abstract(tokens, dtype=jnp.int32), abstract(tokens)]
    options = DistillSection(loss="jsd", temperature=2.0, nll_coef=0.5)
    if teacher == "live":
        args += [abstract(tokens, embed), abstract(vocab, embed)]
        values = compare_with_logits(options, 151_669)
        chunked = lambda h, u, t, m, rows, shared: map_logits(
            values, h, u, m, (t, rows), shared, vocab_size=vocab, chunk=32
        )["loss"].sum()
    else:
        args += [abstract(tokens, top, dtype=jnp.int32), abstract(tokens, top)]
        values = compare_with_top(options, 151_669)
        chunked = lambda h, u, t, m, ids, known: map_logits(
            values, h, u, m, (t, ids, known), vocab_size=vocab, chunk=32
        )["loss"].sum()

    def naive(h, u, t, m, rows, shared):
        log_q = jax.nn.log_softmax(h @ u.T)
        if teacher == "live":
            return (jnp.exp(log_q) * (log_q - jax.nn.log_softmax(rows @ shared.T))).sum()
        return (jnp.exp(shared) * jnp.take_along_axis(log_q, rows, 1)).sum()

    temporaries = lambda fn: jax.jit(jax.grad(fn)).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporaries(chunked) <= temporaries(naive) / 5 and temporaries(naive) > 10**9
