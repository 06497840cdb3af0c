"""transformers' row of `launch.benchmark_decode --checkpoint --peer=transformers`, run by --peer_python: PyTorch on the
CPU in float32, greedy with its cache."""

import argparse
import importlib.util

from turns import round_figures, rss_bytes, take_turns, timed


def make_measure(args, torch, model):
    """A function that measures one round."""
    ids = 1000 + torch.arange(max(args.prefill, args.context))[None]

    @torch.inference_mode()
    def read(num_prompt: int):
        return model(ids[:, :num_prompt], use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decode(out) -> None:
        for _ in range(args.tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)

    def measure() -> dict[str, float]:
        prefill = timed(lambda: read(args.prefill))
        out = read(args.context)
        return round_figures(prefill, timed(lambda: decode(out)), args.tokens)

    return measure


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    for name in ("context", "tokens", "prefill", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{name} is not installed for --peer_python")
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(args.threads)
    base, _ = rss_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    about = {"package": f"transformers {transformers.__version__}, torch {torch.__version__}"}
    take_turns(about, base, make_measure(args, torch, model))


if __name__ == "__main__":
    main()
