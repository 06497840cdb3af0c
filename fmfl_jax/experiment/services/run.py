"""A run of the services: FedAvg is tuned, then every arm and what needs no federation, seed after seed."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fmfl_jax.data.classification import LabelledText, Rows
from fmfl_jax.experiment.loop.participation import Record
from fmfl_jax.experiment.services import students
from fmfl_jax.experiment.services.alignment import alignment, text_metrics, write_about_professions
from fmfl_jax.experiment.services.arm import Arm, Inputs, Settings, Tuned, run_arm
from fmfl_jax.experiment.services.arms import aligned, distilled, make_arms
from fmfl_jax.experiment.services.calibrate import calibrated
from fmfl_jax.experiment.services.config import ServicesConfig
from fmfl_jax.experiment.services.data import (
    TUNING_SEED,
    Corpus,
    SeedData,
    hashed,
    hashed_rows,
    public_labelled,
    seed_data,
    test_texts,
)
from fmfl_jax.experiment.services.evaluation import evaluate
from fmfl_jax.experiment.services.foundation import Answers, FoundationModel, Written, answers, written
from fmfl_jax.experiment.services.report import last_mean, mean_figures, measures, settings_text
from fmfl_jax.experiment.services.silos import zero_shot_arm
from fmfl_jax.experiment.services.trust import ask_freely, trust
from fmfl_jax.models.classifiers import Model, linear_text_classifier, text_classifier
from fmfl_jax.parallel import local_copy
from fmfl_jax.services import calibration
from fmfl_jax.services.bias import Scorer

_ALONE_RATES, _ALONE_STEPS = (2.0, 8.0, 24.0, 72.0), (20, 100, 300, 1000)  # without a federation; tuned over
_LOOKED_AT = ("fedavg", "distill", "augment")  # students whose answers are looked at one by one


class ServicesResult(NamedTuple):
    """rows: one a seed and arm, see report.measures. histories: {arm: one list of records a seed}. sweep: accuracy on
    validation rows of every setting that was tried. evaluation: of every seed's students. alignment, trust: means
    over the seeds; by_seed: {service: each seed's figures}. None where not asked."""

    rows: list[dict]
    histories: dict[str, list[list[Record]]]
    settings: Settings
    sweep: list[dict]
    evaluation: dict | None
    alignment: dict | None = None
    trust: dict | None = None
    by_seed: dict[str, list[dict]] | None = None


class _Setting(NamedTuple):
    """Of a student without a federation."""

    learning_rate: float
    num_steps: int


class _Shared(NamedTuple):
    """Of all seeds. temperature: of the FM's answers; public: the few public rows with labels. taught_student,
    labelled_student: settings without a federation, on the FM's labels and on real ones."""

    config: ServicesConfig
    corpus: Corpus
    model: Model
    fm: FoundationModel
    test_texts: LabelledText
    test: Rows
    generated: Written | None
    fm_generated: Answers | None
    fm_judged: Answers
    temperature: float
    public: LabelledText
    taught_student: _Setting
    labelled_student: _Setting


def run_services(
    config: ServicesConfig,
    corpus: Corpus,
    fm: FoundationModel,
    directory: pathlib.Path,
    *,
    scorer: Scorer | None = None,
    say: Callable[[str], None] = print,
) -> ServicesResult:
    """Runs everything in `directory`; what was finished there is not run again. scorer: of toxicity, None for none.

    Raises ValueError for too few texts, a format of answers that does not fit, and an FM that cannot do what a service
    needs.
    """
    num_classes = len(corpus.classes)
    config.check_classes(num_classes)
    texts = test_texts(corpus, config.data, config.seed)
    test = hashed_rows(texts, config.data)
    student = linear_text_classifier if config.student == "linear" else text_classifier
    model = student(config.data.num_buckets, num_classes)
    seed_data(corpus, config.data, test, config.seed)  # too few texts are refused before anything is asked
    if "silos" in config.services and fm.tune is None:
        raise ValueError(f"services=silos needs a model that can be tuned, and {fm.name} cannot: give a checkpoint")
    tuning = seed_data(corpus, config.data, test, TUNING_SEED + config.seed)
    temperature, public = _calibrated(config, fm, tuning)
    made = written(fm, num_classes, config.num_generated, config.seed) if "generate" in config.services else None
    if made is not None:
        say(f"{fm.name} wrote {made.num_asked} texts, {len(made.texts)} passed the filters")
    scored = None if made is None else answers(fm, made.texts, temperature)
    judged = answers(fm, texts.texts[: config.data.num_judged], temperature)
    few = public_labelled(corpus, config.data, config.seed)
    alone = _tuned_students(model, tuning, public, num_classes)
    shared = _Shared(config, corpus, model, fm, texts, test, made, scored, judged, temperature, few, *alone)
    settings, sweep = tune(shared, tuning, public, directory / "tuning")
    tried = f"tuned on {len(tuning.validation.y)} rows of another seed, {len(sweep)} settings"
    say(f"{tried}: {settings_text(settings)}; temperature of the answers {temperature:.2f}")
    rows, histories, pools, kept = [], {}, [], []
    for seed in range(config.seed, config.seed + config.seeds):
        data = seed_data(corpus, config.data, test, seed)
        pool = answers(fm, data.pool, temperature)
        inputs = Inputs(config, settings, model, fm, data, seed, pool, shared.public, made, scored)
        pools.append(inputs)
        found, finals = _seed_rows(shared, inputs, directory / f"seed{seed}", histories, say)
        rows += found
        kept.append({name: finals[name] for name in _LOOKED_AT if name in finals})
    evaluation = None
    if "evaluate" in config.services:
        evaluation = evaluate(config, corpus, model, pools, kept, test, judged.log_probs)
    looks = {"alignment": _alignment, "trust": _trust}
    by_seed = {name: [look(shared, one) for one in kept] for name, look in looks.items() if name in config.services}
    means: dict[str, dict] = {name: mean_figures(found) for name, found in by_seed.items()}
    if "alignment" in means:
        means["alignment"]["text"] = _written_text(shared, scorer)
    if "trust" in means:
        means["trust"]["text"] = None if fm.complete is None else ask_freely(fm, config.seed)
    seen = means.get("alignment"), means.get("trust")
    return ServicesResult(rows, histories, settings, sweep, evaluation, *seen, by_seed)


def _alignment(shared: _Shared, kept: dict) -> dict:
    """The service `alignment`, of a seed's students and the FM."""
    config, fm = shared.config, shared.fm
    judged = shared.test_texts.texts[: config.data.num_judged]
    prior = shared.fm_judged.log_prior

    def of_student(params):
        return lambda texts: students.probabilities(shared.model, params, hashed(texts, config.data)).argmax(axis=1)

    predict = {name: of_student(params) for name, params in kept.items()}
    predict["the FM"] = lambda texts: answers(fm, texts, shared.temperature, log_prior=prior).log_probs.argmax(axis=1)
    labels = shared.test_texts.labels[: len(judged)].tolist()
    return alignment(predict, judged, labels, len(shared.corpus.classes))


def _written_text(shared: _Shared, scorer: Scorer | None) -> dict | None:
    """Bias and toxicity of what the FM writes; None where it writes nothing."""
    fm = shared.fm
    if fm.complete is None:
        return None
    own = [] if shared.generated is None else shared.generated.texts
    return text_metrics(own, write_about_professions(fm, shared.config.seed), scorer)


def _trust(shared: _Shared, kept: dict) -> dict:
    """The service `trust`, likewise."""
    config = shared.config
    x, y = shared.test.x[: config.data.num_judged], shared.test.y[: config.data.num_judged]
    p = {name: students.probabilities(shared.model, params, x) for name, params in kept.items()}
    p["the FM"] = np.exp(shared.fm_judged.log_probs)
    return trust(p, y, fm_name="the FM")


def tune(shared: _Shared, data: SeedData, public: Answers, directory: pathlib.Path) -> tuple[Settings, list[dict]]:
    """(the best settings, all that were tried), by the validation rows of a seed that no result uses. public: the FM's
    answers on its pool. What no service needs is not tried."""
    config, seed = shared.config, TUNING_SEED + shared.config.seed
    task = data.task._replace(test=data.validation)
    data, sweep = data._replace(task=task), []

    def tried(kind: str, tuned: Tuned) -> float:
        every = Settings(tuned, tuned, tuned)
        inputs = Inputs(config, every, shared.model, shared.fm, data, seed, public, shared.public)
        place = directory / "_".join([kind, *(f"{name}{value:g}" for name, value in tuned._asdict().items())])
        arm = {
            "fedavg": lambda: Arm("tuning", task, tuned),
            "distill": lambda: distilled(inputs, place)[0],
            "features": lambda: aligned(inputs)[0],
            "silos": lambda: zero_shot_arm(inputs),
        }[kind]()
        accuracy = last_mean(run_arm(inputs, arm, place).history)
        sweep.append({"kind": kind} | tuned._asdict() | {"validation_accuracy": accuracy})
        return accuracy

    def best(kind: str, grid: list[Tuned]) -> Tuned:
        return max(grid, key=lambda one: tried(kind, one))

    services, rates, fewest = set(config.services), config.learning_rates, min(config.local_epochs)
    plain = [Tuned(rate, epochs) for epochs in config.local_epochs for rate in rates]
    fedavg = best("fedavg", plain)
    if "features" in services:
        fedavg = best("features", [fedavg._replace(align_strength=strength) for strength in config.align_strengths])
    taught = silo = fedavg
    if {"distill", "generate", "ensemble"} & services:
        taught = best("distill", [Tuned(rate, fewest, server) for server in config.server_lrs for rate in rates])
    if "silos" in services:
        weights = config.teacher_weights
        silo = best("silos", [one._replace(teacher_weight=weight) for weight in weights for one in plain])
    return Settings(fedavg, taught, silo), sweep


def _calibrated(config: ServicesConfig, fm: FoundationModel, data: SeedData) -> tuple[float, Answers]:
    """(temperature, answers at it) of the tuning seed's pool, whose first num_labelled rows are the public labelled
    ones. Raises ValueError for an FM that answers none of these with a class's word."""
    found, few = answers(fm, data.pool), config.data.num_labelled
    if fm.score is None and not np.any(np.ptp(found.log_probs[:few], axis=1)):
        raise ValueError(
            f"fm_access=text: {fm.name} named no class in its answers to {few} labelled texts: another template, or "
            "template=auto, may ask better"
        )
    temperature = calibration.fit_temperature(found.log_probs[:few], data.pool_rows.y[:few])
    return temperature, found._replace(log_probs=calibration.with_temperature(found.log_probs, temperature))


def _tuned_students(model: Model, data: SeedData, public: Answers, num_classes: int) -> tuple[_Setting, _Setting]:
    """The best settings on the validation rows: of a student of the FM's labels, and of all clients' rows."""
    rows = data.task.train
    grid = [_Setting(rate, steps) for rate in _ALONE_RATES for steps in _ALONE_STEPS]

    def best(x, targets) -> _Setting:
        ones = np.ones(len(x), np.float32)
        return max(
            grid,
            key=lambda one: students.accuracy(model, students.fit(model, x, targets, ones, *one), data.validation),
        )

    taught = best(data.pool_rows.x, public.log_probs.astype(np.float32))
    return taught, best(rows.x, students.log_labels(rows.y, num_classes))


def _seed_rows(
    shared: _Shared, inputs: Inputs, directory: pathlib.Path, histories: dict[str, list[list[Record]]], say
) -> tuple[list[dict], dict]:
    """A seed's rows, and the last models of its arms {name: params}."""
    data, target = inputs.data, shared.config.target_accuracy
    num_classes = len(shared.corpus.classes)
    rows, finals = [], {}

    def worst(params) -> float:
        each = students.class_accuracies(shared.model, params, shared.test, num_classes)
        return students.worst_client(each, data.histograms)

    for arm in make_arms(inputs, directory):
        place = directory / arm.name.replace(", ", "_").replace(" ", "_")
        result = run_arm(inputs, arm, place)
        params = local_copy(result.state.params)
        row = {"arm": arm.name, "seed": inputs.seed} | measures(result.history, target)
        row["worst_client"] = worst(params)
        rows.append(row)
        histories.setdefault(arm.name, []).append(result.history)
        finals[arm.name] = params
        reached = "not held" if row["rounds_to"] is None else f"held from round {row['rounds_to']}"
        say(f"seed {inputs.seed}, {arm.name}: accuracy {row['accuracy']:.3f}, {target:g} {reached}")
    if "calibrate" in shared.config.services:
        rows += calibrated(inputs, finals["fedavg"], shared.test, worst)
    return rows + _unfederated(shared, inputs), finals


def _unfederated(shared: _Shared, inputs: Inputs) -> list[dict]:
    """The student on the FM's labels, on all rows, on each client's own; and the FM itself."""
    config, data, model = shared.config, inputs.data, shared.model
    num_classes, real = len(shared.corpus.classes), shared.labelled_student._asdict()

    def fitted(x, log_probs):
        targets, ones = log_probs.astype(np.float32), np.ones(len(x), np.float32)
        return students.fit(model, x, targets, ones, *shared.taught_student)

    taught = fitted(data.pool_rows.x, inputs.fm_pool.log_probs)
    central = students.centralized(model, data.task, num_classes, **real)
    own = students.alone(model, data.task, num_classes, **real)
    judged = shared.test_texts.labels[: len(shared.fm_judged.log_probs)]

    def worst(params) -> float:
        return students.worst_client(
            students.class_accuracies(model, params, shared.test, num_classes), data.histograms
        )

    found = [
        ("no federation: on the FM's labels", students.accuracy(model, taught, shared.test), worst(taught)),
        ("centralized: all rows in one place", students.accuracy(model, central, shared.test), worst(central)),
        ("no federation: clients alone, mean", float(own.mean()), None),
        ("the FM itself", calibration.accuracy(shared.fm_judged.log_probs, judged), None),
    ]
    if shared.generated is not None and shared.fm_generated is not None:
        wrote = fitted(hashed(shared.generated.texts, config.data), shared.fm_generated.log_probs)
        accuracy = students.accuracy(model, wrote, shared.test)
        found.insert(1, ("no federation: on the FM's own texts", accuracy, worst(wrote)))
    return [
        {"arm": name, "seed": inputs.seed, "accuracy": accuracy, "worst_client": low} for name, accuracy, low in found
    ]
