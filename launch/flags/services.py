"""The flags of a run of the foundation model's services."""

import math

from absl import flags

from fmfl_jax.experiment.methods.names import parse_method
from fmfl_jax.experiment.services.config import (
    ACCESS,
    ASK,
    LOGITS,
    PLACEMENTS,
    SERVICES,
    STUDENTS,
    DataConfig,
    LoraTuning,
    PlacementConfig,
    ServicesConfig,
)
from launch.flags.network import network_from_flags

_DATA, _RUN = DataConfig(), ServicesConfig()

_SERVICES = flags.DEFINE_list(
    "services",
    list(_RUN.services),
    f"Any of {', '.join(SERVICES)}. distill: the FM teaches at the server; generate: on texts that it wrote; augment: "
    "clients' minority classes filled; ensemble: FedDF and the mixture; reweight: clients weighed, with and without "
    "attackers; calibrate, features: the last layer fitted anew, features aligned (--student=hidden); silos: every "
    "client tunes an FM of its own, its model's teacher; evaluate: the FM as judge; alignment: groups, swapped words, "
    "bias; trust: confidence, deferral, self-consistency.",
)
_PLACEMENT = flags.DEFINE_enum("placement", "edge", PLACEMENTS, "Where the FM answers first.")
_FALLBACK = flags.DEFINE_enum("fallback", "none", ["none", *PLACEMENTS], "Where else, while the way there is down.")
_OUTAGE = flags.DEFINE_string(
    "outage", "none", "The way to the FM goes up and down: UP:DOWN, mean rounds of each; none: always up."
)
_TIMEOUT_S = flags.DEFINE_float("timeout_s", 1.0, "Wait for an answer that does not come, s.", lower_bound=0)
_ACCESS = flags.DEFINE_enum("fm_access", "logits", ACCESS, "text: the FM is an API that answers in words alone.")
_STUDENT = flags.DEFINE_enum("student", _RUN.student, STUDENTS, "The clients' model: linear, or with a hidden layer.")
_STRENGTHS = flags.DEFINE_list("align_strengths", ["0.1", "1"], "Feature alignment is tuned over these.")
_VIRTUAL = flags.DEFINE_integer("num_virtual", _RUN.num_virtual, "CCVR's virtual features a class.", lower_bound=1)
_LORA_RANK = flags.DEFINE_integer("lora_rank", _RUN.lora.rank, "Rank of the silos' LoRA.", lower_bound=1)
_LORA_LR = flags.DEFINE_float("lora_lr", _RUN.lora.learning_rate, "Learning rate of the silos' LoRA.")
_LORA_STEPS = flags.DEFINE_integer("lora_steps", _RUN.lora.num_steps, "Steps of 8 texts of each.", lower_bound=1)
_MUTUAL_STEPS = flags.DEFINE_integer(
    "mutual_steps", _RUN.lora.mutual_steps, "Steps where the small model knows better.", lower_bound=1
)
_ASK_EVERY_ROUND = flags.DEFINE_bool(
    "ask_every_round", False, "Ask anew in each round, the cache serving in outages only; else once."
)
_LOGITS = flags.DEFINE_string("logits", "full", "How answers are sent: full, bits:B or topk:K.")
_ASK = flags.DEFINE_string(
    "ask", "all", "Which texts are asked about: all, unsure:FRACTION (of the student, after 5 rounds), random:FRACTION."
)
_NUM_CLIENTS = flags.DEFINE_integer("num_clients", _DATA.num_clients, "Clients.", lower_bound=2)
_ROWS = flags.DEFINE_integer("rows_per_client", _DATA.rows_per_client, "Labelled texts of each.", lower_bound=2)
_ALPHA = flags.DEFINE_float("alpha", _DATA.alpha, "Concentration of the Dirichlet mixtures of the clients' labels.")
_POOL = flags.DEFINE_integer("num_pool", _DATA.num_pool, "Public texts without labels.", lower_bound=2)
_LABELLED = flags.DEFINE_integer("num_labelled", _DATA.num_labelled, "Of these, with labels.", lower_bound=2)
_VALIDATION = flags.DEFINE_integer("num_validation", _DATA.num_validation, "Rows to tune FedAvg by.", lower_bound=2)
_NUM_TEST = flags.DEFINE_integer("num_test", _DATA.num_test, "Test rows.", lower_bound=2)
_JUDGED = flags.DEFINE_integer("num_judged", _DATA.num_judged, "Test rows that the FM sees too.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("num_rounds", _RUN.num_rounds, "Rounds of every arm.", lower_bound=1)
_COHORT = flags.DEFINE_integer("cohort_size", _RUN.cohort_size, "Clients a round.", lower_bound=1)
_RATES = flags.DEFINE_list("learning_rates", ["8", "24"], "FedAvg is tuned over these ...")
_EPOCHS = flags.DEFINE_list("local_epochs", ["1"], "... times these numbers of local steps on all rows of a client.")
_STEPS = flags.DEFINE_integer("server_steps", _RUN.server_steps, "Steps of distillation a round.", lower_bound=1)
_SERVER_LRS = flags.DEFINE_list("distill_lrs", ["4"], "Arms with a teacher are tuned over these x --learning_rates.")
_TEACHER_WEIGHTS = flags.DEFINE_list(
    "teacher_weights", ["0.5"], "Share of a silo's loss that is its teacher's; tuned over, x rates x epochs."
)
_STUDENT_LR = flags.DEFINE_float("student_lr", _RUN.student_lr, "Learning rate of the over-fitting alarm's students.")
_FM_WEIGHT = flags.DEFINE_float("fm_weight", _RUN.fm_weight, "Of the FM in the teacher mixed with the ensemble.")
_ATTACKERS = flags.DEFINE_float("attack_fraction", _RUN.attack_fraction, "Share of attackers in the attacked arms.")
_TEMPERATURE = flags.DEFINE_float("reweight_temperature", _RUN.reweight_temperature, "tau of exp(accuracy / tau).")
_FLOOR = flags.DEFINE_float("reweight_floor", _RUN.reweight_floor, "Share of its FedAvg weight that a client keeps.")
_GENERATED = flags.DEFINE_integer("num_generated", _RUN.num_generated, "Texts that the FM writes.", lower_bound=4)
_TARGET = flags.DEFINE_float("target_accuracy", _RUN.target_accuracy, "Rounds, seconds and joules are counted to it.")
_SEEDS = flags.DEFINE_integer("seeds", _RUN.seeds, "Runs of every arm, from --seed on.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "First seed.", lower_bound=0)


def config_from_flags() -> ServicesConfig:
    """The flags as a checked configuration."""
    up, down = _outage()
    return ServicesConfig(
        services=tuple(_SERVICES.value),
        data=DataConfig(
            num_clients=_NUM_CLIENTS.value,
            rows_per_client=_ROWS.value,
            alpha=_ALPHA.value,
            num_pool=_POOL.value,
            num_labelled=_LABELLED.value,
            num_validation=_VALIDATION.value,
            num_test=_NUM_TEST.value,
            num_judged=_JUDGED.value,
        ),
        placement=PlacementConfig(
            placement=_PLACEMENT.value,
            fallback=None if _FALLBACK.value == "none" else _FALLBACK.value,
            mean_up_rounds=up,
            mean_down_rounds=down,
            ask_every_round=_ASK_EVERY_ROUND.value,
            timeout_s=_TIMEOUT_S.value,
        ),
        num_rounds=_ROUNDS.value,
        cohort_size=_COHORT.value,
        learning_rates=_numbers("learning_rates", _RATES.value, float),
        local_epochs=_numbers("local_epochs", _EPOCHS.value, int),
        server_steps=_STEPS.value,
        server_lrs=_numbers("distill_lrs", _SERVER_LRS.value, float),
        teacher_weights=_numbers("teacher_weights", _TEACHER_WEIGHTS.value, float),
        student_lr=_STUDENT_LR.value,
        fm_weight=_FM_WEIGHT.value,
        logits=parse_method("logits", _LOGITS.value, LOGITS),
        ask=parse_method("ask", _ASK.value, ASK),
        attack_fraction=_ATTACKERS.value,
        reweight_temperature=_TEMPERATURE.value,
        reweight_floor=_FLOOR.value,
        num_generated=_GENERATED.value,
        target_accuracy=_TARGET.value,
        network=network_from_flags(),
        student=_STUDENT.value,
        align_strengths=_numbers("align_strengths", _STRENGTHS.value, float),
        num_virtual=_VIRTUAL.value,
        lora=LoraTuning(
            rank=_LORA_RANK.value,
            learning_rate=_LORA_LR.value,
            num_steps=_LORA_STEPS.value,
            mutual_steps=_MUTUAL_STEPS.value,
        ),
        fm_access=_ACCESS.value,
        seeds=_SEEDS.value,
        seed=_SEED.value,
    )


def _outage() -> tuple[float, float]:
    if _OUTAGE.value == "none":
        return 1.0, 0.0
    return _numbers("outage", _OUTAGE.value.split(":"), float, count=2)


def _numbers(name: str, texts: list[str], kind: type, count: int | None = None) -> tuple:
    try:
        found = tuple(kind(text) for text in texts)
    except ValueError:
        found = ()
    if not found or len(found) != (count or len(found)) or not all(map(math.isfinite, found)):
        raise ValueError(f"--{name}={','.join(texts)}: expected {count or 'some'} numbers")
    return found
