"""Cross-silo teachers (section III-B): every client tunes an FM's LoRA on its own rows and learns from it.

The client's small model trains on its own rows and on the public pool with the local teacher's probabilities; only the
small model is sent and averaged. Nothing of a row leaves its silo, and no teacher's answer either.

    zero-shot    the FM as it is
    LoRA         tuned on the silo's rows
    mutual       then both teach each other, on public rows with labels, whoever has the lower loss the other
                 (FedMKT's selection, Fan et al., COLING 2025; here once, before the rounds, where theirs alternates)
    shuffled     LoRA's answers on the pool with their rows shuffled (control)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fmfl_jax.data.classification import LabelledText, Task
from fmfl_jax.experiment.services import costs, students
from fmfl_jax.experiment.services.arm import Arm, Inputs
from fmfl_jax.experiment.services.data import controls, hashed, with_soft_rows_for_clients
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
    data, num_classes = inputs.data, inputs.data.histograms.shape[1]
    silos = [_silo(inputs, client) for client in range(len(data.texts))]
    pool, public = data.pool_rows.x, hashed(inputs.public.texts, inputs.config.data)
    num_silos, rounds = len(silos), _costs(inputs)

    def arm(name: str, rows: list[tuple[np.ndarray, np.ndarray]], with_costs: bool = True) -> Arm:
        task: Task = with_soft_rows_for_clients(data.task, rows, num_classes)
        return Arm(name, task, inputs.tuned, fm_rounds=(rounds,) if with_costs else ())

    def mutual_rows(silo: Silo) -> tuple[np.ndarray, np.ndarray]:
        learns = silo.selection.second_learns
        x = np.concatenate([pool, public[learns]])
        return x, np.concatenate([np.exp(silo.mutual.log_probs), silo.fm_says[learns]])

    zero_shot = np.exp(inputs.fm_pool.log_probs)
    shuffled = [np.exp(controls(silo.lora.log_probs, inputs.seed)["shuffled"]) for silo in silos]
    return [
        arm("silo teacher, zero-shot", [(pool, zero_shot)] * num_silos, False),
        arm("silo teacher, LoRA", [(pool, np.exp(silo.lora.log_probs)) for silo in silos]),
        arm("silo teacher, mutual", [mutual_rows(silo) for silo in silos]),
        arm("silo teacher, LoRA, labels shuffled", [(pool, p) for p in shuffled]),
    ]


def _silo(inputs: Inputs, client: int) -> Silo:
    fm, data, tuning = inputs.fm, inputs.data, inputs.config.lora
    assert fm.tune is not None  # run_services refuses others
    seed = inputs.seed * len(data.texts) + client
    own, num_classes = data.texts[client], data.histograms.shape[1]
    tuned = fm.tune(own.texts, np.eye(num_classes)[own.labels], tuning.num_steps, seed)
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
        both = tuned.tune([public.texts[i] for i in learns], small[learns], tuning.mutual_steps, seed)
    lora, mutual = (answers(teacher, data.pool, temperature) for teacher in (tuned, both))
    return Silo(lora, mutual, selection, says)


def _small_model(inputs: Inputs, own: LabelledText) -> Callable[[list[str]], np.ndarray]:
    """texts -> float64 [N, K] of the client's small model after its own rows."""
    config, num_classes = inputs.config.data, inputs.data.histograms.shape[1]
    x, targets = hashed(own.texts, config), students.log_labels(own.labels, num_classes)
    ones = np.ones(len(x), np.float32)
    params = students.fit(inputs.model, x, targets, ones, inputs.tuned.client_lr, _STUDENT_STEPS)
    return lambda texts: students.probabilities(inputs.model, params, hashed(texts, config))


def _costs(inputs: Inputs) -> costs.FmRound:
    """The tuning and the scoring of the pool at all clients side by side. A step's backward pass, in which no weight of
    the base gets a gradient, costs as much as its forward pass."""
    tuning = inputs.config.lora
    trained = 2 * tuning.batch_size * (tuning.num_steps + tuning.mutual_steps)
    texts = trained + len(inputs.data.pool) + len(inputs.public.texts)
    size = RequestSize(prompt_tokens=inputs.fm_pool.mean_tokens, output_tokens=0)
    return costs.at_all_clients(inputs.fm.size, costs.Request(texts, size), len(inputs.data.texts))
