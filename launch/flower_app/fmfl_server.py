"""The ServerApp: the simulator's command of launch.flower_server's, with its clients on Flower's nodes."""

import functools

from flwr.app import Context  # pyright: ignore[reportMissingImports]
from flwr.serverapp import Grid, ServerApp  # pyright: ignore[reportMissingImports]

from fmfl_jax.deploy.flower import GridLink
from fmfl_jax.deploy.secagg_plus import secagg_plus
from launch import flower_job

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    link = GridLink(grid)
    flower_job.run_server(str(context.run_config["job"]), link, functools.partial(secagg_plus, link))
