"""The `memserve` command: serve, chat, bench, simulate, version.

The flags of `serve` are the fields of `memserve.config.ServeConfig`. A mistake of the operator is one
line on standard error and exit code 2, never a traceback.
"""

import dataclasses
import logging
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

import click

from memserve import __version__
from memserve.bench.command import bench
from memserve.config import ServeConfig, read_config_file
from memserve.errors import UsageError
from memserve.sim.command import simulate

LOG_FORMAT = "%(asctime)s launcher %(levelname)s %(name)s: %(message)s"
DEFAULT_URL = "http://127.0.0.1:8000"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def cli() -> None:
    """Serve large language models from one machine, with one command."""


def flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every flag of `ServeConfig`, each with its environment twin."""
    hints = typing.get_type_hints(ServeConfig)
    for field in reversed(dataclasses.fields(ServeConfig)):
        choices = field.metadata["choices"]
        name = field.name.replace("_", "-")
        option = click.option(
            f"--{name}/--no-{name}" if hints[field.name] is bool else f"--{name}",
            field.name,
            default=field.default,
            type=click.Choice(choices) if choices else plain_type(hints[field.name]),
            envvar=f"MEMSERVE_{field.name.upper()}",
            show_envvar=True,
            help=field.metadata["help"],
        )
        command = option(command)
    return command


def plain_type(hint: object) -> type:
    """`int` of `int | None`: what click converts a flag's text to."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    assert isinstance(kind, type)
    return kind


def load_file(context: click.Context, _parameter: click.Parameter, path: str | None) -> None:
    """Make the values of a configuration file the defaults of the other flags."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **read_config_file(Path(path))}


@cli.command()
@click.argument("model", required=False, envvar="MEMSERVE_MODEL")
@click.option(
    "--config",
    type=str,
    is_eager=True,
    expose_value=False,
    callback=load_file,
    envvar="MEMSERVE_CONFIG",
    show_envvar=True,
    help="YAML or TOML file with values for these flags.",
)
@flags
def serve(model: str | None, **values: typing.Any) -> None:  # noqa: ANN401
    """Serve MODEL: a hub id, a folder, or a GGUF file; without it, a small demo model."""
    from memserve.launcher import serve as run

    config = ServeConfig(**values)
    logging.basicConfig(level=config.log_level.upper(), format=LOG_FORMAT)
    run(model, config)


@cli.command()
@click.option("--url", default=DEFAULT_URL, help="Server to talk to.")
@click.option("--model", default=None, help="Model name [default: the server's first].")
@click.option("--system", default=None, help="System prompt.")
@click.option("--api-key", envvar="MEMSERVE_API_KEY", default=None, help="Key to send.")
@click.option("--temperature", default=0.7, help="0 is greedy.")
@click.option("--max-tokens", default=None, type=int, help="Longest answer.")
def chat(**values: typing.Any) -> None:  # noqa: ANN401
    """Chat with a running server in the terminal."""
    from memserve.chat import ChatOptions, run_chat

    run_chat(ChatOptions(**values))


cli.add_command(simulate)
cli.add_command(bench)


@cli.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


def main() -> None:
    """Run the command line."""
    try:
        cli()
    except UsageError as error:
        click.echo(f"memserve: {error}", err=True)
        sys.exit(2)
