"""The completion of command lines in shells: scripts that ask `steppe __complete` for what can follow."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from steppe.cli.grammar import Command, Option, grammar

ASK = "__complete"
"""The command that the scripts call, with the words up to the cursor; it prints a candidate and a tab and its meaning
a line, or `FILES`."""
FILES = ":files"

_BASH = r"""# Completion of steppe for bash:  eval "$(steppe completion bash)"
_steppe() {
    local IFS=$'\n' line
    COMPREPLY=()
    for line in $(steppe __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null); do
        if [[ $line == :files ]]; then
            compopt -o default
            return
        fi
        COMPREPLY+=("${line%%$'\t'*}")
    done
}
complete -F _steppe steppe
"""

_ZSH = r"""#compdef steppe
# Completion of steppe for zsh, after compinit:  eval "$(steppe completion zsh)"
_steppe() {
    local line
    local -a found
    for line in "${(@f)$(steppe __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        if [[ $line == :files ]]; then
            _files
            return
        fi
        [[ -n $line ]] && found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    done
    _describe -V steppe found
}
compdef _steppe steppe
"""

_FISH = r"""# Completion of steppe for fish:  steppe completion fish > ~/.config/fish/completions/steppe.fish
function __steppe_complete
    set -l words (commandline -opc) "$(commandline -ct)"
    set -l found (steppe __complete $words[2..-1] 2>/dev/null)
    if test "$found" = :files
        __fish_complete_path (commandline -ct)
    else
        printf '%s\n' $found
    end
end
complete -c steppe -f -a '(__steppe_complete)'
"""

SCRIPTS: Mapping[str, str] = MappingProxyType({"bash": _BASH, "zsh": _ZSH, "fish": _FISH})


def candidates(words: Sequence[str]) -> list[tuple[str, str]] | None:
    """Return what the last of the words can become, each with its meaning; None for a file.

    >>> candidates(["comp"])[0]
    ('compare', 'Train methods at equal compute and show which generalizes better.')
    >>> [name for name, _ in candidates(["compare", "--device", "c"])]
    ['cpu', 'cuda']
    """
    *before, last = words or [""]
    found = _possible(before, last)
    return None if found is None else [(name, about) for name, about in found if name.startswith(last)]


def _possible(before: Sequence[str], last: str) -> list[tuple[str, str]] | None:
    known = grammar()
    if not before:
        options = [("--help", "Explain the commands."), ("--version", "Print the version.")]
        return [*((c.name, c.summary) for c in known.commands.values()), *(options if last.startswith("-") else [])]
    command = known.commands.get(before[0])
    if command is None:
        return []
    if last.startswith("-"):
        return [*_names(command), ("--help", "Explain it.")]
    if option := _awaiting(command, before):
        if "--methods" in option.names:
            return list(known.methods.items())
        if "PATH" in option.value:
            return None
        return [(choice, option.help) for choice in option.choices]
    if command.takes_recipe:
        return [(r.name, r.summary) for r in known.recipes.values()] if len(before) == 1 else _names(command)
    if command.name == "methods":
        return list(known.methods.items())
    if command.takes_folder and len(before) == 1:
        return None
    return [(value, known.recipes[value].summary if value in known.recipes else "") for value in command.values]


def _names(command: Command) -> list[tuple[str, str]]:
    return [(name, option.help) for option in command.options for name in option.names]


def _awaiting(command: Command, before: Sequence[str]) -> Option | None:
    """Return the option that the next word is a value of."""
    for values, word in enumerate(reversed(before)):
        if word.startswith("--"):
            option = None if "=" in word else command.option(word)
            return option if option and option.value and (option.many or not values) else None
    return None


def lines(words: Sequence[str]) -> Iterator[str]:
    """Yield what a script reads."""
    found = candidates(words)
    if found is None:
        yield FILES
        return
    for name, about in found:
        yield f"{name}\t{about.split('. ')[0]}"
