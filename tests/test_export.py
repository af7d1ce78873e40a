"""What goes along in a model file: a temperature that makes confidence honest, and what it costs to say unsure."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from vegc import cli
from vegc.core import VegcError
from vegc.dataset import ImageDataset
from vegc.evaluate import evaluate, predictions, stage_temperature
from vegc.export import export, load_model_file, predict, write_model_file
from vegc.ingest import add
from vegc.metrics import calibration_error, scaled, scaled_confidence, unsure_table
from vegc.stages import save_stage
from vegc.train import load_stage, train


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    "Four colours that are easily mistaken; a small network whose last layer was made four times too sure afterwards."
    src, rng = tmp_path_factory.mktemp('export'), np.random.default_rng(0)
    tints = dict(red=(190, 110, 110), green=(110, 190, 110), blue=(110, 110, 190), grey=(140, 140, 140))
    for i in range(400):
        where = src / 'in' / list(tints)[i % 4]
        where.mkdir(parents=True, exist_ok=True)
        pixels = np.array(tints[where.name]) + rng.normal(0, 32, 3) + rng.normal(0, 20, (24, 24, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(where / f'{i}.png')
    ds = ImageDataset(src / 'set', subject='other')
    add(src / 'in', ds)
    train(ds, arch='small_cnn', size=24, bs=32, epochs=(0, 4), weights=None)
    learn = load_stage(ds, 'raw')
    last = [m for m in learn.model.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad(): [t.mul_(4) for t in (last.weight, last.bias) if t is not None]
    save_stage(learn, 'sure')
    return ds


@pytest.fixture(scope='module')
def file(dataset, tmp_path_factory): return export(dataset, 'sure', tmp_path_factory.mktemp('file') / 'sure.safetensors')


def probabilities(table): return table.filter(regex='^p_').to_numpy()


def test_probabilities_from_the_file_are_calibrated_and_names_stay_the_same(dataset, file):
    table, model = predictions(dataset, 'sure', 'test'), load_model_file(file)
    told = predict(model, [dataset.path / p for p in table.path])
    assert model.temperature == pytest.approx(stage_temperature(dataset, 'sure')) and model.temperature > 1.5
    assert told.predicted_label.tolist() == table.predicted_label.tolist()
    np.testing.assert_allclose(probabilities(told), scaled(probabilities(table), model.temperature), atol=2e-5)
    right = (table.label == table.predicted_label).to_numpy()
    assert calibration_error(told.confidence, right) < .6*calibration_error(table.probability, right)


def test_a_model_judged_on_a_folder_says_what_the_stage_says_at_its_temperature(dataset, file, tmp_path):
    table = predictions(dataset, 'sure', 'test')
    for i, row in table.iterrows():
        to = tmp_path / row.label / f'{i}.png'
        to.parent.mkdir(exist_ok=True)
        to.write_bytes((dataset.path / row.path).read_bytes())
    mine, stage = evaluate(load_model_file(file), tmp_path), evaluate(dataset, 'sure', 'test')
    assert mine.accuracy == stage.accuracy and mine.temperature == 1
    assert mine.scores['calibration_error'] == pytest.approx(stage.scores['calibration_error_scaled'], abs=1e-3)
    assert mine.unsure.threshold.tolist() == pytest.approx(stage.unsure.threshold.tolist(), abs=1e-3), 'thresholds of evaluate are thresholds of predict'


def test_the_file_says_what_unsure_costs(dataset, file):
    table, model = predictions(dataset, 'sure', 'valid'), load_model_file(file)
    right = (table.label == table.predicted_label).to_numpy()
    number = pd.Categorical(table.label, categories=model.classes).codes.astype(int)
    confidence, _ = scaled_confidence(probabilities(table), number)  # each half at the temperature of the other
    for wanted in (.4, .6, .8):
        row = model.cost(wanted)
        kept = confidence >= row['threshold']
        assert (row['answered'], row['mistakes'], row['right_lost']) == (kept.sum(), (~right & kept).sum(), (right & ~kept).sum())
        assert abs(row['threshold'] - wanted) == min(abs(r['threshold'] - wanted) for r in model.about['unsure'])
    assert len(unsure_table(confidence, right)) < len(model.about['unsure']) <= 50


def test_the_command_line_names_the_price(dataset, file):
    picture = str(next((dataset.path / 'images').glob('*/*.png')))
    run = CliRunner().invoke(cli.app, ['predict', str(file), picture, '--unsure-below', '.999'])
    row = load_model_file(file).cost(.999)
    assert run.exit_code == 0 and 'unsure' in run.stdout
    assert f'{row["share"]:.0%} answered, {row["accuracy"]:.1%} of them rightly' in run.stdout and f'holds back {row["right_lost"]} right answers' in run.stdout
    run = CliRunner().invoke(cli.app, ['predict', str(file), picture, '--unsure-below', '.999', '--json'])
    assert json.loads(run.stdout)


def test_files_from_before_still_load_and_a_damaged_temperature_does_not(dataset, file, tmp_path):
    with safe_open(file, 'pt') as f: about = json.loads(f.metadata()['about'])
    old = {k: v for k, v in about.items() if k not in ('temperature', 'unsure')}
    model, table = load_stage(dataset, 'sure').model, predictions(dataset, 'sure', 'test')
    before = load_model_file(write_model_file(tmp_path / 'old.safetensors', model, old))
    told = predict(before, [dataset.path / p for p in table.path])
    np.testing.assert_allclose(probabilities(told), probabilities(table), atol=2e-5)
    assert before.temperature == 1 and before.cost(.5) is None
    for bad in (0, -1, float('nan')):
        write_model_file(tmp_path / 'bad.safetensors', model, old | dict(temperature=bad))
        with pytest.raises(VegcError, match='above 0'): load_model_file(tmp_path / 'bad.safetensors')


def test_without_a_valid_part_the_network_speaks_for_itself(dataset, tmp_path):
    import shutil
    ds = ImageDataset(shutil.copytree(dataset.path, tmp_path / 'set'))
    ds.update(ds.images[ds.images.split == 'valid'].assign(split='none'), ['split'])
    model = load_model_file(export(ds, 'sure', tmp_path / 'm.safetensors'))
    assert model.temperature == 1 and model.about['unsure'] == []
