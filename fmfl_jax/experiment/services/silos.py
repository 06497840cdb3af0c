"""Cross-silo teachers (section III-B): every client tunes an FM's LoRA on its own rows and learns from it.

    loss of silo k = (1 - w) mean_own CE(label, student) + w mean_pool CE(p_teacher k, student)

The pool is public text, the same at all silos; rate, steps and w are tuned with the zero-shot teacher, which needs no
tuned FM. Only the small model is sent and averaged: nothing of a row leaves its silo, and no teacher's answer either.

    zero-shot    the FM as it is
    LoRA         tuned on the silo's rows
    mutual       then both teach each other, on public rows with labels, whoever has the lower loss the other
                 (FedMKT's selection, Fan et al., COLING 2025; here once, before the rounds, where theirs alternates)
    shuffled, uniform    LoRA's answers on the pool with their rows shuffled; equal probabilities (controls)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fmfl_jax.data.classification import LabelledText
from fmfl_jax.experiment.services import costs, students
from fmfl_jax.experiment.services.arm import Arm, Inputs
from fmfl_jax.experiment.services.data import controls, hashed, with_taught_rows_for_clients
from fmfl_jax.experiment.services.foundation import Answers, answers
from fmfl_jax.services import calibration
from fmfl_jax.services.placement import RequestSize
from fmfl_jax.services.teach import Mutual, mutual_targets

_STUDENT_STEPS = 100  # of the small model before it and its teacher compare themselves


class Silo(NamedTuple):
    """A silo's answers on the pool, tuned alone and after the mutual teaching; selection: who learnt from whom on the
    public rows with labels; fm_says: float64 [P, K], the tuned FM's probabilities there."""

    lora: Answers
    mutual: Answers
    selection: Mutual
    fm_says: np.ndarray


def silo_arms(inputs: Inputs) -> list[Arm]:
    """The arms of the module's list."""
    data = inputs.data
    silos = [_silo(inputs, client) for client in range(len(data.texts))]
    pool, public = data.pool_rows.x, hashed(inputs.public.texts, inputs.config.data)
    rounds = (_costs(inputs, tuned=True),)

    def mutual_rows(silo: Silo) -> tuple[np.ndarray, np.ndarray]:
        learns = silo.selection.second_learns
        x = np.concatenate([pool, public[learns]])
        return x, np.concatenate([np.exp(silo.mutual.log_probs), silo.fm_says[learns]])

    lora = [(pool, np.exp(silo.lora.log_probs)) for silo in silos]
    arms = [
        zero_shot_arm(inputs),
        _arm(inputs, "silo teacher, LoRA", lora, rounds),
        _arm(inputs, "silo teacher, mutual", [mutual_rows(silo) for silo in silos], rounds),
    ]
    for name in ("shuffled", "uniform"):
        rows = [(pool, np.exp(controls(silo.lora.log_probs, inputs.seed)[name])) for silo in silos]
        arms.append(_arm(inputs, f"silo teacher, LoRA, labels {name}", rows, rounds))
    return arms


def zero_shot_arm(inputs: Inputs) -> Arm:
    """Every silo's teacher is the FM as it is."""
    rows = [(inputs.data.pool_rows.x, np.exp(inputs.fm_pool.log_probs))] * len(inputs.data.texts)
    return _arm(inputs, "silo teacher, zero-shot", rows, (_costs(inputs, tuned=False),))


def _arm(
    inputs: Inputs, name: str, rows: list[tuple[np.ndarray, np.ndarray]], rounds: tuple[costs.FmRound, ...]
) -> Arm:
    """rows: each silo's taught rows x [m, L] and the teacher's probabilities [m, K]."""
    num_classes, settings = inputs.data.histograms.shape[1], inputs.settings.silo
    task = with_taught_rows_for_clients(inputs.data.task, rows, num_classes, teacher_weight=settings.teacher_weight)
    return Arm(name, task, settings, fm_rounds=rounds)


def _silo(inputs: Inputs, client: int) -> Silo:
    fm, data, tuning = inputs.fm, inputs.data, inputs.config.lora
    assert fm.tune is not None  # run_services refuses others
    seed = inputs.seed * len(data.texts) + client
    own, num_classes = data.texts[client], data.histograms.shape[1]
    calibrated = -inputs.fm_pool.log_prior[0]
    counts = data.histograms[client] + 1.0
    offset = calibrated + np.log(counts / counts.sum())
    tuned = fm.tune(own.texts, np.eye(num_classes)[own.labels], offset, num_steps=tuning.num_steps, seed=seed)
    public = inputs.public
    raw = answers(tuned, public.texts).log_probs
    temperature = calibration.fit_temperature(raw, public.labels)
    says = np.exp(calibration.with_temperature(raw, temperature))
    small = _small_model(inputs, own)(public.texts)
    truth = np.arange(len(public.labels)), public.labels
    selection = mutual_targets(-np.log(says[truth]), -np.log(np.maximum(small[truth], 1e-12)))
    learns, both = np.flatnonzero(selection.first_learns), tuned
    if len(learns):
        assert tuned.tune is not None
        texts = [public.texts[i] for i in learns]
        both = tuned.tune(texts, small[learns], calibrated, num_steps=tuning.mutual_steps, seed=seed)
    lora, mutual = (answers(teacher, data.pool, temperature) for teacher in (tuned, both))
    return Silo(lora, mutual, selection, says)


def _small_model(inputs: Inputs, own: LabelledText) -> Callable[[list[str]], np.ndarray]:
    """texts -> float64 [N, K] of the client's small model after its own rows."""
    config, num_classes = inputs.config.data, inputs.data.histograms.shape[1]
    x, targets = hashed(own.texts, config), students.log_labels(own.labels, num_classes)
    ones = np.ones(len(x), np.float32)
    params = students.fit(inputs.model, x, targets, ones, inputs.settings.fedavg.client_lr, _STUDENT_STEPS)
    return lambda texts: students.probabilities(inputs.model, params, hashed(texts, config))


def _costs(inputs: Inputs, *, tuned: bool) -> costs.FmRound:
    """The scoring of the pool at all clients side by side, and the tuning before it. A step's backward pass, in which
    no weight of the base gets a gradient, costs as much as its forward pass."""
    tuning, texts = inputs.config.lora, len(inputs.data.pool)
    if tuned:
        texts += 2 * tuning.batch_size * (tuning.num_steps + tuning.mutual_steps) + len(inputs.public.texts)
    size = RequestSize(prompt_tokens=inputs.fm_pool.mean_tokens, output_tokens=0)
    return costs.at_all_clients(inputs.fm.size, costs.Request(texts, size), len(inputs.data.texts))
