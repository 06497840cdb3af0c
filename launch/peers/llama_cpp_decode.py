"""llama.cpp's row of `launch.benchmark_decode --checkpoint --peer=llama_cpp`, run by --peer_python.

Through llama-cpp-python (`llama_cpp`, built for this machine) where that is installed, else `xllamacpp`, whose
prebuilt server reports llama.cpp's own timings. Greedy; the cache of one call is not kept for the next.
"""

import argparse
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable

from turns import round_figures, rss_bytes, take_turns, timed


def with_xllamacpp(args) -> tuple[dict, Callable[[], dict[str, float]]]:
    """({name, version, instruction sets}, a function that measures)."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.n_ctx = max(args.prefill, args.context + args.tokens) + 8
    params.n_batch = params.n_ubatch = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.verbosity = -1
    server = xllamacpp.Server(params)

    def complete(num_prompt: int, num_new: int) -> tuple[dict, float]:
        """Timings that the server gives, and this process's CPU milliseconds."""
        request = {"prompt": prompt(num_prompt), "n_predict": num_new, "temperature": 0, "ignore_eos": True}
        begin = time.process_time()
        answer = server.handle_completions(request | {"cache_prompt": False})
        if "timings" not in answer:
            raise SystemExit(f"llama_cpp_decode: {answer}")
        return answer["timings"], 1e3 * (time.process_time() - begin)

    def measure() -> dict[str, float]:
        prefill, prefill_cpu = complete(args.prefill, 1)
        _, first_cpu = complete(args.context, 1)
        decode, decode_cpu = complete(args.context, args.tokens + 1)  # the first token is the prompt's
        return {
            "decode_ms": decode["predicted_ms"] / args.tokens,
            "decode_cpu_ms": (decode_cpu - first_cpu) / args.tokens,
            "prefill_ms": prefill["prompt_ms"],
            "prefill_cpu_ms": prefill_cpu,
        }

    version = importlib.metadata.version("xllamacpp")
    return {"package": f"xllamacpp {version}", "system": xllamacpp.get_system_info()}, measure


def with_llama_cpp(args) -> tuple[dict, Callable[[], dict[str, float]]]:
    """As `with_xllamacpp`."""
    import llama_cpp  # pyright: ignore[reportMissingImports]
    import numpy as np

    size = max(args.prefill, args.context + args.tokens) + 8
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    model = llama_cpp.Llama(args.model, n_ctx=size, n_batch=512, n_ubatch=512, verbose=False, **threads)
    vocabulary = model.n_vocab()

    def eval_prompt(num_prompt: int) -> None:
        model.reset()
        model.eval(prompt(num_prompt))

    def decode() -> None:
        for _ in range(args.tokens):
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            model.eval([int(np.argmax(np.ctypeslib.as_array(logits, (vocabulary,))))])

    def measure() -> dict[str, float]:
        prefill = timed(lambda: eval_prompt(args.prefill))
        eval_prompt(args.context)
        return round_figures(prefill, timed(decode), args.tokens)

    system = llama_cpp.llama_print_system_info().decode()
    return {"package": f"llama-cpp-python {llama_cpp.__version__}", "system": system}, measure


def prompt(length: int) -> list[int]:
    """Token ids; any do."""
    return [1000 + i for i in range(length)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="GGUF file")
    for name in ("context", "tokens", "prefill", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    named = importlib.util.find_spec("llama_cpp") is not None
    if not named and importlib.util.find_spec("xllamacpp") is None:
        raise SystemExit("neither llama_cpp (llama-cpp-python) nor xllamacpp is installed for --peer_python")
    base, _ = rss_bytes()
    about, measure = (with_llama_cpp if named else with_xllamacpp)(args)
    take_turns(about, base, measure)


if __name__ == "__main__":
    main()
