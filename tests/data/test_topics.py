"""The built-in labelled texts: balanced, from a seed, learnable by words but not wholly."""

import numpy as np

from fmfl_jax.data.classification import hashed_ngrams
from fmfl_jax.data.topics import TOPICS, topic_texts


def test_words_tell_most_topics_and_not_all():
    train, test = topic_texts(800, 400, seed=0)
    assert np.bincount(test.labels).tolist() == [100] * 4 and len(TOPICS) == 4
    assert len(set(train.texts) & set(test.texts)) < 8
    counts = []
    for part in (train, test):
        ids = hashed_ngrams(part.texts, num_buckets=2048, max_ngrams=24)
        bags = np.zeros((len(ids), 2048))
        np.add.at(bags, (np.arange(len(ids))[:, None], ids), ids > 0)
        counts.append(bags)
    by_class = np.stack([counts[0][train.labels == k].sum(axis=0) + 1 for k in range(4)])
    naive_bayes = counts[1] @ np.log(by_class / by_class.sum(axis=1, keepdims=True)).T
    assert 0.7 < (naive_bayes.argmax(axis=1) == test.labels).mean() < 0.92
    again, _ = topic_texts(800, 7, seed=0)
    assert again.texts == train.texts != topic_texts(800, 7, seed=1)[0].texts
