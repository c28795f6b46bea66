"""sampling/run_record.py: what generate.json holds, and what an older one meant."""

import copy
import json
import math

import pytest
import torch

from dnnlib import settings
from sampling import run_record


def test_fingerprint_sees_weights_and_arguments_and_no_layout():
    net = torch.nn.Conv2d(3, 4, 1)
    same = copy.deepcopy(net).to(memory_format=torch.channels_last)
    assert run_record.fingerprint(same) == run_record.fingerprint(net)
    moved = copy.deepcopy(net)
    with torch.no_grad():
        moved.bias[0] += 1e-6
    other = copy.deepcopy(net)
    other.init_kwargs = {'use_fp16': True}
    half = copy.deepcopy(net).to(torch.bfloat16)
    assert len({run_record.fingerprint(each) for each in (net, moved, other, half)}) == 4


def test_record_comes_back_and_is_plain_json(tmp_path):
    of = {'steps': 18, 'S_max': math.inf, 'class': (0, 1), 'gnet': None, 'rho': 7.5}
    before = run_record.save(str(tmp_path), of, {'torch': '2'}, before=None)
    text = (tmp_path / 'generate.json').read_text()
    assert json.loads(text, parse_constant=pytest.fail)['torch'] == '2'
    assert run_record.read(str(tmp_path)) == before
    assert run_record.differences(before, of) == ''
    changed = {**of, 'steps': 40, 'S_max': 50.0, 'eta': 0}
    assert run_record.differences(before, changed) == '--steps: 18 → 40, --S_max: inf → 50.0, --eta: none → 0'


def test_a_record_replaces_only_the_one_that_it_may(tmp_path):
    saved = [run_record.save(str(tmp_path), {'steps': n}, {}, before) for n, before in [(1, None), (2, None)]]
    assert saved == [{'steps': 1}, {'steps': 1}]
    assert run_record.save(str(tmp_path), {'steps': 3}, {}, {'steps': 1}) == {'steps': 3}


@pytest.mark.parametrize(
    ('old', 'sampler'),
    [
        ({'randn_like': 'db', 'steps': 18, 'S_churn': 0}, 'heun'),
        ({'randn_like': 'db', 'steps': 18, 'solver': 'heun', 'disc': 'vp'}, 'ablation'),
        ({'randn_like': 'ddb', 'steps': 40, 'scheme': 'rk'}, 'rk'),
        ({'randn_like': 'ddb', 'steps': 40, 'scheme': 'taylor'}, 'taylor'),
    ],
)
def test_records_of_version_0_1_are_read_in_words_of_today(tmp_path, old, sampler):
    settings.save(run_record.path_in(str(tmp_path)), {'settings': old, 'torch': '2.13'})
    now = {name: value for name, value in old.items() if name not in ('randn_like', 'scheme')} | {'sampler': sampler}
    assert run_record.read(str(tmp_path)) == now


@pytest.mark.parametrize('text', ['', '[]', '{"settings": 3}', '{}'])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    (tmp_path / 'generate.json').write_text(text)
    with pytest.raises(ValueError, match=r'generate\.json is not a record of generate\.py'):
        run_record.read(str(tmp_path))
