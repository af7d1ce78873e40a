"""What goes along in a model file: a temperature that calibrates confidence, and what it costs to say unsure."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from vegc import cli
from vegc.acquire.add import add
from vegc.cleaning.outliers import bulk_distance, fit_bulk
from vegc.core import VegcError
from vegc.data.dataset import ImageDataset
from vegc.evaluation.evaluate import evaluate, evaluate_file, stage_temperature
from vegc.evaluation.metrics import calibration_error, scaled, scaled_confidence, unsure_table
from vegc.evaluation.predictions import embeddings, predictions
from vegc.features.features import pooled
from vegc.features.pixels import pixel_batches
from vegc.sharing.export import export
from vegc.sharing.model_file import load_model_file, predict, write_model_file
from vegc.training.stages import save_stage
from vegc.training.train import load_stage, train


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
def file(dataset, tmp_path_factory):
    return export(dataset, 'sure', tmp_path_factory.mktemp('file') / 'sure.safetensors')


def probabilities(table): return table.filter(regex='^p_').to_numpy()


def test_probabilities_from_the_file_are_calibrated_and_names_stay_the_same(dataset, file):
    table, model = predictions(dataset, 'sure', 'test'), load_model_file(file)
    got = predict(model, [dataset.path / p for p in table.path])
    assert model.temperature == pytest.approx(stage_temperature(dataset, 'sure')) and model.temperature > 1.5
    assert got.predicted_label.tolist() == table.predicted_label.tolist()
    np.testing.assert_allclose(probabilities(got), scaled(probabilities(table), model.temperature), atol=2e-5)
    right = (table.label == table.predicted_label).to_numpy()
    assert calibration_error(got.confidence, right) < .6*calibration_error(table.probability, right)


def test_a_model_judged_on_a_folder_says_what_the_stage_says_at_its_temperature(dataset, file, tmp_path):
    table = predictions(dataset, 'sure', 'test')
    for i, row in table.iterrows():
        to = tmp_path / row.label / f'{i}.png'
        to.parent.mkdir(exist_ok=True)
        to.write_bytes((dataset.path / row.path).read_bytes())
    mine, stage = evaluate_file(load_model_file(file), tmp_path), evaluate(dataset, 'sure', 'test')
    assert mine.accuracy == stage.accuracy and mine.temperature == 1
    assert mine.scores['calibration_error'] == pytest.approx(stage.scores['calibration_error_scaled'], abs=1e-3)
    thresholds = stage.unsure.threshold.tolist()  # those of evaluate are those of predict
    assert mine.unsure.threshold.tolist() == pytest.approx(thresholds, abs=1e-3)


def test_the_file_says_what_unsure_costs(dataset, file):
    table, model = predictions(dataset, 'sure', 'valid'), load_model_file(file)
    right = (table.label == table.predicted_label).to_numpy()
    number = pd.Categorical(table.label, categories=model.classes).codes.astype(int)
    confidence, _ = scaled_confidence(probabilities(table), number)  # each half at the temperature of the other
    for wanted in (.4, .6, .8):
        row = model.cost(wanted)
        kept = confidence >= row['threshold']
        found = [kept.sum(), (~right & kept).sum(), (right & ~kept).sum()]
        assert [row[k] for k in ('answered', 'mistakes', 'right_lost')] == found
        assert abs(row['threshold'] - wanted) == min(abs(r['threshold'] - wanted) for r in model.about['unsure'])
    assert len(unsure_table(confidence, right)) < len(model.about['unsure']) <= 50


def test_the_command_line_names_the_price(dataset, file):
    picture = str(next((dataset.path / 'images').glob('*/*.png')))
    run = CliRunner().invoke(cli.app, ['predict', str(file), picture, '--unsure-below', '.999'])
    row = load_model_file(file).cost(.999)
    assert run.exit_code == 0 and 'unsure' in run.stdout
    assert f'{row["share"]:.0%} answered, {row["accuracy"]:.1%} of them correctly (95 % CI ' in run.stdout
    assert f'holds back {row["right_lost"]} correct answers' in run.stdout
    run = CliRunner().invoke(cli.app, ['predict', str(file), picture, '--unsure-below', '.999', '--json'])
    assert json.loads(run.stdout)


def test_files_from_before_still_load_and_a_damaged_temperature_does_not(dataset, file, tmp_path):
    with safe_open(file, 'pt') as f: about = json.loads(f.metadata()['about'])
    old = {k: v for k, v in about.items() if k not in ('temperature', 'unsure')}
    model, table = load_stage(dataset, 'sure').model, predictions(dataset, 'sure', 'test')
    before = load_model_file(write_model_file(tmp_path / 'old.safetensors', model, old))
    got = predict(before, [dataset.path / p for p in table.path])
    np.testing.assert_allclose(probabilities(got), probabilities(table), atol=2e-5)
    assert before.temperature == 1 and before.cost(.5) is None
    assert list(got)[-1] == 'outlier' and got.outlier.isna().all() and got.outlier.dtype == float
    assert before(dataset.path / table.path[0])[0]['outlier'] is None, 'null in JSON, never NaN'
    for bad in (0, -1, float('nan')):
        write_model_file(tmp_path / 'bad.safetensors', model, old | dict(temperature=bad))
        with pytest.raises(VegcError, match='above 0'): load_model_file(tmp_path / 'bad.safetensors')


def test_without_a_valid_part_the_network_speaks_for_itself(dataset, tmp_path):
    import shutil
    ds = ImageDataset(shutil.copytree(dataset.path, tmp_path / 'set'))
    ds.update(ds.images[ds.images.split == 'valid'].assign(split='none'), ['split'], reassign=True)
    with pytest.warns(match='no outlier score: .*no (picture|image) in the valid split'):
        file = export(ds, 'sure', tmp_path / 'm.safetensors')
    model = load_model_file(file)
    assert model.temperature == 1 and model.about['unsure'] == [] and model.about['outlier'] is None
    assert predict(model, ds.path / ds.images.path[0]).outlier.isna().all()


def test_a_valid_image_that_cannot_be_read_costs_the_temperature_and_not_the_export(dataset, tmp_path):
    import shutil
    ds = ImageDataset(shutil.copytree(dataset.path, tmp_path / 'set'))
    shutil.rmtree(ds.path / 'predictions', ignore_errors=True)
    ds.items().query('split == "valid"').path.map(lambda p: (ds.path / p).write_bytes(b'no image'))
    assert stage_temperature(ds, 'sure') is None
    with pytest.warns(match='no outlier score: not_image'): file = export(ds, 'sure', tmp_path / 'm.safetensors')
    assert load_model_file(file).temperature == 1


def off_topic():
    "Noise, stripes, a chequered board, lines of writing, flat colours of the kinds that no class has."
    rng, fine = np.random.default_rng(1), np.indices((24, 24))
    stripes = [(fine[1] // k % 2)*255 for k in (1, 2, 3)]
    boards = [(fine.sum(0) // k % 2)*255 for k in (2, 4)]
    writing = [np.where(rng.random((24, 24)) < .3, 0, 255) for _ in range(3)]
    drawn = [np.repeat(d[..., None], 3, 2) for d in stripes + boards + writing]
    flat = [np.full((24, 24, 3), c) for c in ((0, 0, 0), (255, 255, 255), (255, 255, 0), (0, 255, 255))]
    return [np.asarray(x, np.uint8) for x in [*drawn, *flat, *rng.integers(0, 256, (8, 24, 24, 3))]]


def test_off_topic_images_are_more_unusual_than_held_out_ones(dataset, file):
    held_out = predict(file, [dataset.path / p for p in predictions(dataset, 'sure', 'test').path])
    got = predict(file, off_topic())
    pairs = got.outlier.to_numpy()[:, None] - held_out.outlier.to_numpy()
    auroc = ((pairs > 0) + .5*(pairs == 0)).mean()
    assert auroc > .9, auroc
    assert held_out.outlier.between(0, 1).all()
    assert held_out.outlier.mean() == pytest.approx(.5, abs=.12), 'fresh images of the kind lie anywhere'


def test_the_outlier_score_is_the_share_of_valid_pictures_nearer_to_the_bulk_of_train(dataset, file):
    body, size = load_stage(dataset, 'sure').model.cpu().eval()[0], load_model_file(file).size
    paths = {part: [dataset.path / p for p in predictions(dataset, 'sure', part).path] for part in ('valid', 'test')}
    valid, test = (pooled(body, torch.cat(list(pixel_batches(p, size)))).numpy() for p in paths.values())
    train = embeddings(dataset, 'sure', 'train')
    fit = fit_bulk(train)
    near = np.sort(bulk_distance(valid, *fit))
    got = predict(file, paths['test'])
    nearer = np.searchsorted(near, bulk_distance(test, *fit))/len(near)
    np.testing.assert_allclose(got.outlier, nearer, atol=1.5/len(near))
    ranks = np.arange(len(near))/len(near)  # a valid image has its own, but for rounding in other batches
    assert sorted(predict(file, paths['valid']).outlier) == pytest.approx(ranks, abs=.05)
    assert load_model_file(file).about['outlier'] == dict(train=len(train), valid=len(valid))


def test_a_score_changes_nothing_else_and_a_reader_that_does_not_know_it_sees_none(dataset, file, tmp_path):
    with safe_open(file, 'pt') as f:
        meta, axes = f.metadata(), f.get_tensor('bulk_axes')
        added = sum(f.get_tensor(k).nbytes for k in f.keys() if k.startswith('bulk_'))
    model = load_stage(dataset, 'sure').model
    plain = load_model_file(write_model_file(tmp_path / 'plain.safetensors', model, json.loads(meta['about'])))
    paths = [dataset.path / p for p in predictions(dataset, 'sure', 'test').path]
    paths += [dataset.path / 'dataset.toml', off_topic()[0]]
    a, b = predict(file, paths, unsure_below=.6), predict(plain, paths, unsure_below=.6)
    pd.testing.assert_frame_equal(a.drop(columns='outlier'), b.drop(columns='outlier'))
    assert list(a) == list(b) and a.outlier.isna().sum() == 1
    assert a.outlier.isna().tolist() == (a.status == 'failed').tolist()
    assert len(axes) <= 64 and added < 4000 + axes.nbytes + 8*axes.shape[1]
    graph = json.loads(meta['graph'])
    # the scores stay where readers of before look for them
    assert graph['output'] != graph['outlier'] and 'output' in graph


def test_people_are_told_how_many_pictures_are_unusual(dataset, file, tmp_path):
    for i, x in enumerate(off_topic()): Image.fromarray(x).save(tmp_path / f'{i}.png')
    (tmp_path / 'no.png').write_text('no picture')
    run = CliRunner().invoke(cli.app, ['predict', str(file), str(tmp_path), '--csv', str(tmp_path / 'table.csv')])
    table = pd.read_csv(tmp_path / 'table.csv')
    assert list(table)[-1] == 'outlier' and len(table) == len(off_topic()) + 1
    unusual = (table.outlier >= .99).sum()
    assert f'{unusual} of {len(off_topic())} are more unusual than 99 % of the valid images' in run.stdout
