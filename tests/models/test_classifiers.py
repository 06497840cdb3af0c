"""The models' outputs and gradients against numpy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmfl_jax.models.classifiers import (
    classification_loss,
    linear_classifier,
    linear_text_classifier,
    make_evaluator,
    small_cnn,
    text_classifier,
)

MODELS = {
    "linear": (linear_classifier(6, 3), np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)),
    "cnn": (small_cnn(8, 3, widths=(2, 3)), np.random.default_rng(1).normal(size=(9, 8, 8, 1)).astype(np.float32)),
    "text": (
        text_classifier(11, 3, embed_dim=4, hidden_dim=5),
        np.random.default_rng(2).integers(0, 11, size=(9, 7)).astype(np.int32),
    ),
}
Y = np.asarray([0, 1, 2, 0, 1, 2, 0, 0, 1], np.int32)


def grad_of(model):
    return jax.jit(jax.value_and_grad(classification_loss(model)))


@pytest.mark.parametrize("name", MODELS)
def test_masked_rows_count_nothing(name):
    model, x = MODELS[name]
    params, frozen = model.init(jax.random.key(0)), {"x": jnp.asarray(x), "y": jnp.asarray(Y)}
    grad_fn = grad_of(model)
    whole = {"index": jnp.asarray([3, 5, 8], jnp.int32), "mask": jnp.ones(3, bool)}
    padded = {"index": jnp.asarray([3, 7, 5, 8], jnp.int32), "mask": jnp.asarray([True, False, True, True])}
    for a, b in zip(
        jax.tree.leaves(grad_fn(params, frozen, whole, None)), jax.tree.leaves(grad_fn(params, frozen, padded, None))
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    loss, grad = grad_fn(params, frozen, whole | {"mask": jnp.zeros(3, bool)}, None)
    assert float(loss) == 0 and not any(np.any(g) for g in jax.tree.leaves(grad))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_slopes_of_the_loss(name):
    model, x = MODELS[name]
    params, frozen = model.init(jax.random.key(0)), {"x": jnp.asarray(x), "y": jnp.asarray(Y)}
    batch = {"index": jnp.arange(9, dtype=jnp.int32), "mask": jnp.ones(9, bool)}
    grad_fn = grad_of(model)
    _, grad = grad_fn(params, frozen, batch, None)
    direction = jax.tree.map(lambda g: np.random.default_rng(3).normal(size=g.shape).astype(np.float32), grad)
    move = lambda t: jax.tree.map(lambda p, d: p + np.float32(t) * d, params, direction)
    slope = (grad_fn(move(2e-3), frozen, batch, None)[0] - grad_fn(move(-2e-3), frozen, batch, None)[0]) / 4e-3
    expected = sum(float(jnp.sum(g * d)) for g, d in zip(grad.values(), direction.values()))
    np.testing.assert_allclose(slope, expected, rtol=2e-2, atol=2e-3)


def test_linear_text_counts_words():
    model = linear_text_classifier(5, 2)
    params = {"w": jnp.arange(10.0).reshape(5, 2), "b": jnp.asarray([0.5, -0.5])}
    x = np.asarray([[1, 3, 3, 0], [0, 0, 0, 0], [4, 0, 0, 0]], np.int32)
    counts = np.stack([np.bincount(row[row > 0], minlength=5) / np.sqrt(max((row > 0).sum(), 1)) for row in x])
    want = counts @ np.arange(10).reshape(5, 2) + np.asarray([[0.5, -0.5]])
    np.testing.assert_allclose(model.apply(params, x), want, rtol=1e-6)


def test_cnn_equals_a_plain_loop():
    model, x = MODELS["cnn"]
    params = jax.tree.map(np.asarray, model.init(jax.random.key(1)))

    def block(image, kernel, bias):
        height, width, _ = image.shape
        framed = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        out = np.asarray(
            [
                [np.tensordot(framed[i : i + 3, j : j + 3], kernel, 3) + bias for j in range(width)]
                for i in range(height)
            ]
        )
        out = np.maximum(out, 0)
        return np.asarray(
            [[out[i : i + 2, j : j + 2].max(axis=(0, 1)) for j in range(0, width, 2)] for i in range(0, height, 2)]
        )

    for image, logits in zip(x[:2], model.apply(params, x[:2])):
        hidden = block(block(image, params["conv1"], params["bias1"]), params["conv2"], params["bias2"])
        np.testing.assert_allclose(logits, hidden.reshape(-1) @ params["w"] + params["b"], rtol=1e-4, atol=1e-5)


def test_a_text_is_its_ngrams_and_no_padding():
    model, _ = MODELS["text"]
    params = jax.tree.map(np.asarray, model.init(jax.random.key(1)))
    ids = np.asarray([[4, 9, 9, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    pooled = np.stack([(params["embedding"][4] + 2 * params["embedding"][9]) / np.sqrt(3), np.zeros(4)])
    hidden = np.maximum(pooled @ params["hidden"] + params["hidden_bias"], 0)
    logits = model.apply(jax.tree.map(jnp.asarray, params), ids)
    np.testing.assert_allclose(logits, hidden @ params["w"] + params["b"], rtol=1e-5, atol=1e-6)


def test_evaluation_counts_every_row_once():
    model, x = MODELS["linear"]
    params = {"w": jnp.asarray(np.random.default_rng(4).normal(size=(6, 3)), jnp.float32), "b": jnp.zeros(3)}
    logits = x.astype(float) @ np.asarray(params["w"], float)
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(9), Y]
    for batch_size in (4, 100):
        found = make_evaluator(model, x, Y, batch_size=batch_size)(params)
        assert found["accuracy"] == pytest.approx((logits.argmax(axis=1) == Y).mean())
        assert found["nll"] == pytest.approx(nll.mean(), rel=1e-5)
    with pytest.raises(ValueError, match="no rows"):
        make_evaluator(model, x[:0], Y[:0])


@pytest.mark.parametrize("name", MODELS)
def test_layers_name_every_parameter_once(name):
    model, _ = MODELS[name]
    names = [parameter for layer in model.layers for parameter in layer]
    assert sorted(names) == sorted(model.init(jax.random.key(0)))


def test_features_are_what_the_last_layer_sees():
    model = text_classifier(50, 3, embed_dim=4, hidden_dim=5)
    params = model.init(jax.random.key(0)) | {"b": jnp.asarray([1.0, -2.0, 0.5])}
    x = np.random.default_rng(0).integers(0, 50, size=(6, 7)).astype(np.int32)
    assert model.features is not None
    features = np.asarray(model.features(params, x))
    assert features.shape == (6, 5) and features.min() >= 0
    by_hand = features @ np.asarray(params["w"]) + np.asarray(params["b"])
    np.testing.assert_allclose(model.apply(params, x), by_hand, rtol=1e-5, atol=1e-6)


def test_probabilities_as_targets_are_the_mean_loss_of_labels_drawn_from_them():
    model = linear_text_classifier(20, 3)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(20, 3)), jnp.float32), "b": jnp.zeros(3)}
    x, p = jnp.asarray(rng.integers(0, 20, size=(4, 5)), jnp.int32), jnp.asarray(rng.dirichlet(np.ones(3), 4), "f4")
    batch = {"index": jnp.asarray([2, 0, 1]), "mask": jnp.asarray([True, True, False])}
    loss = classification_loss(model)
    of_labels = [
        loss(params, {"x": x, "y": jnp.full(4, c, jnp.int32)}, {**batch, "mask": jnp.asarray(mask)}, None)
        for mask in ([True, False, False], [False, True, False])
        for c in range(3)
    ]
    expected = (np.asarray(of_labels).reshape(2, 3) * np.asarray(p)[[2, 0]]).sum(axis=1).mean()
    np.testing.assert_allclose(loss(params, {"x": x, "y": p}, batch, None), expected, rtol=1e-5)


def test_gradients_of_many_clients_at_once():
    """20 clients of 300 texts under vmap, against numpy: where XLA's fusions for large reductions set in."""
    clients, rows, length, buckets = 20, 300, 12, 30
    rng = np.random.default_rng(5)
    x = rng.integers(0, buckets, size=(clients, rows, length)).astype(np.int32)
    y = rng.integers(0, 4, size=(clients, rows)).astype(np.int32)
    model = linear_text_classifier(buckets, 4)
    params = {"w": rng.normal(size=(buckets, 4)).astype(np.float32), "b": np.zeros(4, np.float32)}
    frozen = {"x": jnp.asarray(x.reshape(-1, length)), "y": jnp.asarray(y.reshape(-1))}
    batch = {"index": np.arange(clients * rows, dtype=np.int32).reshape(clients, rows)}
    batch["mask"] = np.ones((clients, rows), bool)
    loss = classification_loss(model)
    found = jax.jit(jax.vmap(lambda batch: jax.grad(loss)(params, frozen, batch, None)))(batch)
    weights = (x > 0) / np.sqrt((x > 0).sum(axis=-1, keepdims=True))  # [C, B, L]
    logits = np.einsum("cbl,cblk->cbk", weights, params["w"][x])
    error = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True) - np.eye(4)[y]
    for client in range(clients):
        expected = np.zeros((buckets, 4))
        np.add.at(expected, x[client], weights[client, ..., None] * error[client, :, None] / rows)
        np.testing.assert_allclose(found["w"][client], expected, atol=1e-6)
        np.testing.assert_allclose(found["b"][client], error[client].mean(axis=0), atol=1e-6)
