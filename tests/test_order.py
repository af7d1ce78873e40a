"""Answers depend on the data, not on what was asked before: many questions in several orders, and the same answers."""
import random
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vegc.acquire.add import add
from vegc.cleaning.issues import find_issues
from vegc.data.dataset import ImageDataset
from vegc.evaluation.baselines import baselines
from vegc.evaluation.crossval import (cross_validated_predictions, linear_predictions, out_of_fold_predictions,
                                      small_headline)
from vegc.evaluation.evaluate import evaluate
from vegc.evaluation.growth import would_more_help
from vegc.evaluation.predictions import embeddings, predictions
from vegc.splits.copies import duplicates
from vegc.splits.split import split
from vegc.training.train import train

CLASSES = ('zero', 'one', 'two', 'three')
SCRATCH, FROZEN = 'scratch', 'frozen'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Eighty digits in four classes, some filed under a wrong one, and two stages: from random weights, and not."
    folder, digits = tmp_path_factory.mktemp('order'), load_digits()
    for i, n in enumerate(np.concatenate([np.flatnonzero(digits.target == k)[:20] for k in range(4)])):
        path = folder/'drawn'/CLASSES[(digits.target[n] + (i % 10 == 7)) % 4]/f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray((255 - 15.9*digits.images[n]).astype('uint8'))
        im.resize((64, 64), Image.Resampling.BICUBIC).save(path)
    dataset = ImageDataset(folder/'ds', subject='characters')
    add(folder/'drawn', dataset)
    split(dataset, valid=.25, test=.2)
    train(dataset, arch='small_cnn', size=64, epochs=(0, 3), stage=SCRATCH)
    train(dataset, arch='efficientnet_lite0', size=64, epochs=(2, 1), stage=FROZEN)
    return dataset


def plain(answer):
    "An answer as something that can be compared to the last digit."
    if isinstance(answer, np.ndarray): return answer.tobytes()
    if isinstance(answer, pd.DataFrame): return answer.reset_index(drop=True).to_csv()
    return repr(None if answer is None else answer.to_dict())


QUESTIONS = {
    'predictions': lambda ds: predictions(ds, SCRATCH),
    'embeddings of what saw labels': lambda ds: embeddings(ds, SCRATCH),
    'embeddings of the frozen stage': lambda ds: embeddings(ds, FROZEN),
    'out of fold, from scratch': lambda ds: out_of_fold_predictions(ds, SCRATCH),
    'out of fold, frozen': lambda ds: out_of_fold_predictions(ds, FROZEN),
    'out of fold, no stage': lambda ds: out_of_fold_predictions(ds),
    'more images, from scratch': lambda ds: would_more_help(ds, SCRATCH),
    'more images, frozen': lambda ds: would_more_help(ds, FROZEN),
    'issues of a stage from scratch': lambda ds: find_issues(ds, stage=SCRATCH),
    'issues of a frozen stage': lambda ds: find_issues(ds, stage=FROZEN),
    'issues': lambda ds: find_issues(ds),
    'duplicates': lambda ds: duplicates(ds),
    'cross-validation': lambda ds: cross_validated_predictions(ds, FROZEN),
    'linear, from scratch': lambda ds: linear_predictions(ds, SCRATCH),
    'linear, frozen': lambda ds: linear_predictions(ds, FROZEN),
    'evaluate': lambda ds: evaluate(ds, FROZEN),
    'headline': lambda ds: small_headline(ds, FROZEN),
    'baselines': lambda ds: baselines(ds, SCRATCH)[['method', 'features', 'accuracy']],
}


def answers(dataset, folder, order):
    "Answers to all questions on a copy of the dataset, asked in this order."
    ds = ImageDataset(shutil.copytree(dataset.path, folder/'ds'))
    return {name: plain(QUESTIONS[name](ds)) for name in order}


@pytest.fixture(scope='module')
def first(made, tmp_path_factory): return answers(made, tmp_path_factory.mktemp('first'), QUESTIONS)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('seed', [None, 24])
def test_answers_are_the_same_in_every_order(seed, made, first, tmp_path):
    order = list(QUESTIONS)[::-1]
    if seed is not None: random.Random(seed).shuffle(order)
    again = answers(made, tmp_path, order)
    assert [name for name in QUESTIONS if again[name] != first[name]] == []


def test_a_table_that_is_kept_is_not_that_of_another_question(made, tmp_path):
    "Two stages share the file that holds what was judged out of fold."
    ds = ImageDataset(shutil.copytree(made.path, tmp_path/'ds'))
    one, other = out_of_fold_predictions(ds, SCRATCH), out_of_fold_predictions(ds, FROZEN)
    assert not one.equals(other)
    assert out_of_fold_predictions(ds, SCRATCH).equals(one)


def test_a_stage_that_is_trained_anew_is_asked_anew(made, tmp_path):
    ds = ImageDataset(shutil.copytree(made.path, tmp_path/'ds'))
    before = predictions(ds, SCRATCH)
    train(ds, arch='small_cnn', size=64, epochs=(0, 1), stage=SCRATCH, seed=7, overwrite=True)
    assert not predictions(ds, SCRATCH).equals(before)
