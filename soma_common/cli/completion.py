"""``somastack completion``: the script by which a shell completes commands, options and names."""

from __future__ import annotations

import sys

import click
from click.shell_completion import get_completion_class

from soma_common.cli.examples import examples
from soma_common.errors import ConfigurationError

SHELLS = ("bash", "zsh", "fish")


@click.command(epilog=examples(
    "somastack completion bash > ~/.local/share/bash-completion/completions/somastack", "bash: for every new shell",
    "somastack completion zsh > ~/.zfunc/_somastack", "zsh: with `fpath+=~/.zfunc; autoload -Uz compinit; compinit`",
    "somastack completion fish > ~/.config/fish/completions/somastack.fish", "fish: for every new shell",
    'eval "$(somastack completion bash)"', "for this shell only",
))  # fmt: skip
@click.argument("shell", type=click.Choice(SHELLS))
def completion(*, shell: str) -> None:
    """Print the completion script of a shell: bash (4.4 or newer), zsh or fish.

    Completing asks the command itself, so that it knows new commands and the applications of the folder you are in.
    """
    from soma_common.cli.main import somastack

    kind = get_completion_class(shell)
    if kind is None:
        raise ConfigurationError(f"Nothing is known of {shell}.", cure=f"use one of: {', '.join(SHELLS)}.")
    # click asks the bash that it finds for its version, and complains on stderr: the script is for another machine too.
    script = kind(somastack, {}, "somastack", "_SOMASTACK_COMPLETE")
    sys.stdout.write(script.source_template % script.source_vars() + "\n")
