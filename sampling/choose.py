"""The table of samplers: one name for each, on every command line and in every record, with the dials that it has.

Whoever needs a sampler asks here: `make('rk', num_steps=40)` is a function of (net, latents, class_labels) as
`sampler_2nd.ito_taylor_sampler` is. A new scheme in `sampler_2nd.SCHEMES` is a sampler at once.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import click
import torch

import sampler_2nd
from sampling import edm

ABLATION_OPTIONS = tuple(edm.CHOICES)
LEVEL_OPTIONS = ('num_steps', 'sigma_min', 'sigma_max', 'rho', 'S_min', 'S_max', 'S_noise')  # that all samplers take
OPTIONS = (*LEVEL_OPTIONS, 'S_churn', 'eta', *ABLATION_OPTIONS)

_COMMAND_LINE = {'num_steps': 'steps', 'discretization': 'disc', 'sigmas': 'levels'}  # other names there


class Sampler(NamedTuple):
    """A row of the table.

    Attributes:
        function: sampler(net, latents, class_labels, randn_like=…, num_steps=…, callback=…, its options) → images.
        help: one line.
        dials: the options that it takes besides `LEVEL_OPTIONS`; the first is the strength of its noise.
        num_steps: a usual number of steps.
        path: whether its noise can be that of a `sampler_2nd.BrownianPath` (--noise=path).
        jvp: whether it takes forward-mode derivatives of the network.
    """

    function: Callable[..., torch.Tensor]
    help: str
    dials: tuple[str, ...]
    num_steps: int
    path: bool = False
    jvp: bool = False


_SCHEME_HELP = {
    'rk': 'second order, one evaluation a step',
    'taylor': 'second order, one evaluation with a JVP a step',
    'euler': 'first order, one evaluation a step',
}


def _of_scheme(name: str) -> Sampler:
    function = partial(sampler_2nd.ito_taylor_sampler, scheme=name)
    text = _SCHEME_HELP.get(name, 'a scheme of sampler_2nd.py')
    return Sampler(function, f'SDE, {text}', ('eta',), num_steps=40, path=True, jvp=name == 'taylor')


SAMPLERS: dict[str, Sampler] = {
    'heun': Sampler(edm.edm_sampler, "EDM's: ODE and churn, two evaluations a step", ('S_churn',), num_steps=18),
    **{name: _of_scheme(name) for name in ('rk', 'taylor', 'euler')},
    'ablation': Sampler(
        edm.ablation_sampler, "EDM's, with its choices free", ('S_churn', *ABLATION_OPTIONS), num_steps=18
    ),
}


def samplers() -> dict[str, Sampler]:
    """The table, with the schemes that others have put into `sampler_2nd.SCHEMES`."""
    return SAMPLERS | {name: _of_scheme(name) for name in sampler_2nd.SCHEMES if name not in SAMPLERS}


def name_of(sampler: str | None, randn_like: str | None, scheme: str | None, options: dict[str, Any]) -> str:
    """The sampler that a command line asks for, by --sampler or as the forks of EDM spell it.

    Without any of the three it is EDM's. Its ablation options make it `ablation`.

    Raises:
        click.UsageError: two spellings at once, or an option that belongs to neither.
    """
    if sampler is not None:
        for option, value in [('randn_like', randn_like), ('scheme', scheme)]:
            if value is not None:
                raise click.UsageError(f'--{option}={value} is another spelling of --sampler; give one of the two')
    elif randn_like == 'ddb':
        return scheme or 'taylor'
    elif scheme is not None:
        raise click.UsageError(f'--scheme={scheme} belongs to --randn_like=ddb; --sampler={scheme} says both')
    ablated = any(options.get(name) is not None for name in ABLATION_OPTIONS)
    return 'ablation' if ablated and sampler in (None, 'heun') else sampler or 'heun'


def make(name: str, sigmas: Sequence[float] | None = None, **options: Any) -> partial[torch.Tensor]:
    """The sampler of this name, with the noise levels and the options that were given (those not None) bound to it.

    Raises:
        click.UsageError: an option that this sampler does not have, or a value that nothing can be computed with.
    """
    table = samplers()
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in (*LEVEL_OPTIONS, *table[name].dials):
            raise click.UsageError(_not_a_dial(option, name, table))
        if value != value or (option in ('rho', 'S_noise', 'eta') and math.isinf(value)):
            raise click.UsageError(f'--{option}={value} is not a number to compute with')
    if given.get('S_min', 0) > given.get('S_max', math.inf):
        raise click.UsageError(f'--S_min={given["S_min"]:g} is above --S_max={given["S_max"]:g}')
    if sigmas is not None:
        if name == 'ablation':
            raise click.UsageError('--levels is not for --sampler=ablation, whose levels follow from --disc')
        given['sigmas'] = list(sigmas)
    return partial(table[name].function, **given)


def _not_a_dial(option: str, name: str, table: dict[str, Sampler]) -> str:
    owners = ', '.join(each for each, row in table.items() if option in row.dials)
    word = _COMMAND_LINE.get(option, option)
    if option in ('S_churn', 'eta'):
        return f'--{word} is for {owners}; the noise of --sampler={name} is set by --{table[name].dials[0]}'
    return f'--{word} is for {owners}, and not for --sampler={name}'


def options_in_effect(sampler: partial, guidance: float | None = None) -> dict[str, Any]:
    """The options of a sampler, by the names of the command line, those left at their default included."""
    parameters = inspect.signature(sampler.func).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    options = {**defaults, **sampler.keywords}
    ends = {name: options.get(name) for name in sampler_2nd.EDM_LEVELS}
    if options.get('sigmas') is not None:
        options |= dict.fromkeys(ends)
    elif 'scheme' in options:
        few_steps = sampler_2nd.choose_scheme(options['scheme'], 0).few_steps
        options |= sampler_2nd.complete_levels(**ends, num_steps=options['num_steps'] if few_steps else math.inf)
    if 'eta' in options and options['eta'] is None:
        options['eta'] = sampler_2nd.usual_eta(guidance or 1)
    return {
        _COMMAND_LINE.get(name, name): value
        for name, value in options.items()
        if value is not None and name not in ('randn_like', 'callback', 'scheme')
    }
