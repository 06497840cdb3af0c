"""A small run on the built-in task, for the tests of its parts."""

from fmfl_jax.data.topics import TOPICS, topic_texts
from fmfl_jax.experiment.services.arm import Inputs, Settings, Tuned
from fmfl_jax.experiment.services.config import DataConfig, ServicesConfig
from fmfl_jax.experiment.services.data import Corpus, hashed_rows, public_labelled, seed_data, test_texts
from fmfl_jax.experiment.services.foundation import FoundationModel, answers
from fmfl_jax.models.classifiers import linear_text_classifier, text_classifier

DATA = DataConfig(
    num_clients=6,
    rows_per_client=10,
    num_pool=60,
    num_labelled=20,
    num_validation=40,
    num_test=100,
    num_judged=80,
    num_buckets=512,
    max_ngrams=24,
)
CONFIG = ServicesConfig(
    services=("distill",),
    data=DATA,
    num_rounds=4,
    cohort_size=3,
    learning_rates=(8.0,),
    server_steps=3,
    num_generated=16,
    target_accuracy=0.4,
    seeds=1,
)


def built_in_corpus() -> Corpus:
    """600 notes to train on and 200 to test on."""
    train, test = topic_texts(600, 200, seed=0)
    return Corpus(train, test, TOPICS)


def inputs_of(config: ServicesConfig, corpus: Corpus, fm: FoundationModel, seed: int = 0) -> Inputs:
    """A seed's inputs, untuned."""
    test = hashed_rows(test_texts(corpus, config.data, 0), config.data)
    data = seed_data(corpus, config.data, test, seed)
    make = linear_text_classifier if config.student == "linear" else text_classifier
    model = make(config.data.num_buckets, 4)
    rate = 8.0 if config.student == "linear" else 1.0
    settings = Settings(Tuned(rate, 1, align_strength=1.0), Tuned(rate, 1, 4.0), Tuned(rate, 1, teacher_weight=0.25))
    public = public_labelled(corpus, config.data, 0)
    return Inputs(config, settings, model, fm, data, seed, answers(fm, data.pool), public)
