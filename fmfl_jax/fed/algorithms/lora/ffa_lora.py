"""FFA-LoRA (Sun et al., ICLR 2024): A stays as it was drawn, only B is trained, sent and averaged.

    sum_c w_c A B_c = A sum_c w_c B_c

dW is linear in B, so every mean of B is the mean of the matrices, with noise and clipping too. It is no other
algorithm: fed_opt, SCAFFOLD or DP-FedAvg over the smaller dictionary of parameters.
"""

from collections.abc import Callable

from fmfl_jax.fed.algorithms.lora.factors import pairs_of


def freeze_a[Result](
    loss_fn: Callable[..., Result], params: dict, frozen: dict
) -> tuple[Callable[..., Result], dict, dict]:
    """(loss_fn, params, frozen) with every lora_a moved from params to frozen.

    loss_fn(params, frozen, ...) may be any function of a model that takes both first: the loss before it is
    differentiated (so that no gradient of A is taken, clipped or noised), or the evaluation. Its new form takes the new
    dictionaries. Raises ValueError where params has no lora_a.
    """
    names = {pair.a for pair in pairs_of(params)}

    def with_b_only(params, frozen, *rest):
        return loss_fn(params | {name: frozen[name] for name in names}, frozen, *rest)

    moved = {name: params[name] for name in names}
    return with_b_only, {name: value for name, value in params.items() if name not in names}, frozen | moved
