"""No picture of a person and no weights travel with the project: not as a file, not in a wheel, not inside a
notebook."""
import base64
import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, project_files

# Files that may be pictures or weights, each with where it comes from. Empty: there are none.
ALLOWED_FILES: dict[str, str] = {
    'docs/cleaner.png': "a screenshot of ImageCleaner on the demo's digits, drawn by the program, partly on crops of "
                        "scikit-learn's sample photographs of a temple and a flower",
    'docs/report.png': "a screenshot of the demo's report: scikit-learn's digits drawn by the program, partly on crops "
                       "of its sample photographs",
}

DEMO = ("scikit-learn's digits drawn by the program, partly on crops of scikit-learn's sample photographs of a temple "
        'and a flower')
DIGITS = "scikit-learn's handwritten digits, drawn as files in the notebook"
MEASURED = '; no photograph of those it was measured on'

# Notebooks whose outputs may hold pictures, each with what the pictures show and where they come from.
# A notebook that draws only charts says so; nothing here may be a photograph of a person.
ALLOWED_OUTPUTS: dict[str, str] = {
    'nbs/10_images.ipynb': 'colour noise drawn in the notebook, and a histogram',
    'nbs/20_lists.ipynb': 'a bar chart of made-up lists',
    'nbs/27_add.ipynb': 'noise of 28 pixels drawn in the notebook',
    'nbs/31_pixels.ipynb': "scikit-learn's sample photographs of a flower and a temple",
    'nbs/32_features.ipynb': "crops of scikit-learn's sample photograph of a flower",
    'nbs/40_overlap.ipynb': "crops of scikit-learn's sample photograph of a flower",
    'nbs/42_copies.ipynb': "scikit-learn's sample photographs of a flower and a temple",
    'nbs/43_deal.ipynb': 'a chart of made-up group sizes',
    'nbs/45_split.ipynb': 'smooth colour noise, drawn in the notebook',
    'nbs/50_loaders.ipynb': 'squares of one colour, drawn in the notebook',
    'nbs/55_fit.ipynb': 'half moons drawn in the notebook, and curves of losses and rates on them',
    'nbs/57_probes.ipynb': "a chart of trials on the numbers of scikit-learn's digits",
    'nbs/60_wrong_labels.ipynb': 'a chart of chances on made-up numbers',
    'nbs/61_outliers.ipynb': 'a histogram of made-up numbers',
    'nbs/62_issues.ipynb': "scikit-learn's handwritten digits, and noise drawn in the notebook",
    'nbs/66_widget.ipynb': 'ellipses drawn in the notebook, as small JPEGs',
    'nbs/67_review_page.ipynb': 'ellipses drawn in the notebook, as small JPEGs',
    'nbs/75_baselines.ipynb': "charts of accuracies on scikit-learn's digits",
    'nbs/76_growth.ipynb': "a chart of accuracies on scikit-learn's digits",
    'nbs/80_fonts.ipynb': 'a chart of made-up numbers',
    'nbs/81_charts.ipynb': 'charts: of made-up numbers, and of what a regression and a small network say of digits',
    'nbs/82_pictures.ipynb': DIGITS,
    'nbs/83_interpret.ipynb': 'bright bars on noise, drawn in the notebook',
    'nbs/85_data_facts.ipynb': 'walls of one colour with an ellipse, drawn in the notebook',
    'nbs/87_report.ipynb': 'reports about walls of one colour with an ellipse, drawn in the notebook',
    'nbs/91_export.ipynb': 'squares, stripes and noise drawn in the notebook',
    'nbs/97_demo.ipynb': DEMO,
    'nbs/bench/train.ipynb': 'a chart of costs and accuracies' + MEASURED,
    'nbs/bench/clean.ipynb': 'charts of flaws seen and of confidence' + MEASURED,
    'nbs/bench/split.ipynb': 'a chart of how well details agree' + MEASURED,
    'nbs/bench/ingest.ipynb': 'a chart of processor seconds' + MEASURED,
    'nbs/studies/00_walkthrough.ipynb': DEMO,
}

SUFFIXES = {
    '.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.gif', '.webp', '.avif', '.heic', '.heif', '.bmp', '.tif', '.tiff',
    '.jp2', '.jxl', '.ico', '.psd',
    '.pt', '.pth', '.ckpt', '.bin', '.safetensors', '.onnx', '.pkl', '.pickle', '.joblib', '.h5', '.hdf5', '.keras',
    '.pb', '.tflite', '.gguf',
    '.npy', '.npz', '.mp4', '.mov', '.webm', '.zip', '.tar', '.gz', '.7z', '.parquet', '.pdf',
}


def kind_of(data):
    "What bytes are, if they are a picture, weights or an archive that may hold some."
    starts = {b'\xff\xd8\xff': 'JPEG', b'\x89PNG\r\n': 'PNG', b'GIF8': 'GIF', b'BM': 'BMP', b'II*\0': 'TIFF',
              b'MM\0*': 'TIFF',
              b'\0\0\0\x0cjP': 'JPEG 2000', b'\xff\x0a': 'JPEG XL', b'8BPS': 'PSD',
              b'PK\3\4': 'zip archive (or PyTorch weights)', b'\x1f\x8b': 'gzip',
              b'\x89HDF': 'HDF5', b'\x93NUMPY': 'NumPy array', b'\x80\2': 'pickle', b'\x80\3': 'pickle',
              b'\x80\4': 'pickle', b'\x80\5': 'pickle',
              b'PAR1': 'parquet', b'GGUF': 'GGUF weights', b'%PDF': 'PDF', b'7z\xbc\xaf': '7z archive'}
    for start, kind in starts.items():
        # two printable letters would also be the start of a word
        if data.startswith(start) and not (start == b'BM' and b'\0' not in data[:64]): return kind
    if data[:4] == b'RIFF' and data[8:12] == b'WEBP': return 'WebP'
    if data[4:12] in (b'ftypavif', b'ftypheic', b'ftypmif1', b'ftypmp42', b'ftypisom'): return 'AVIF, HEIC or video'
    if len(data) > 9 and data[8:9] == b'{' and int.from_bytes(data[:8], 'little') < len(data): return 'safetensors'
    return None


INLINE = re.compile(r'data:(?:image|video|application)/[\w.+-]+;base64,([A-Za-z0-9+/=\s]{200,})')


def notebook_pictures(nb):
    "Kinds of pictures in a notebook's outputs and attachments."
    found = []
    for cell in nb.get('cells', []):
        bundles = [o.get('data', {}) for o in cell.get('outputs', [])] + list(cell.get('attachments', {}).values())
        for bundle in bundles:
            found += [mime for mime in bundle if mime.startswith(('image/', 'video/'))]
            found += ['inline in HTML' for mime,
                      value in bundle.items() if mime.startswith('text/') and INLINE.search(''.join(value))]
        source = ''.join(cell.get('source', ''))
        if INLINE.search(source): found.append('inline in the source')
    return found


def findings(files, allowed_files=ALLOWED_FILES, allowed_outputs=ALLOWED_OUTPUTS):
    "What should not be there, among (name, bytes) pairs."
    for name, data in files:
        if name in allowed_files: continue
        if Path(name).suffix.lower() in SUFFIXES: yield f'{name}: a file of this kind may hold pictures or weights'
        if kind := kind_of(data): yield f'{name}: its bytes are {kind}'
        elif name.endswith('.ipynb'):
            pictures = notebook_pictures(json.loads(data))
            if pictures and name not in allowed_outputs:
                yield f'{name}: pictures in its outputs ({pictures[0]}), and no stated source'
        elif found := INLINE.search(data.decode('utf-8', 'replace')):
            yield f'{name}: a picture inlined as base64 at character {found.start()}'


def test_nothing_in_the_repository(): assert list(findings(project_files(ROOT))) == []


def test_nothing_in_the_wheel(built):
    with zipfile.ZipFile(built[0]) as wheel:
        assert list(findings((n, wheel.read(n)) for n in wheel.namelist())) == []


def test_every_allowance_is_used_and_says_why():
    for name, why in (ALLOWED_FILES | ALLOWED_OUTPUTS).items():
        assert (ROOT / name).is_file(), f'{name} is allowed and does not exist'
        assert len(why) > 10
    unused = [n for n in ALLOWED_OUTPUTS if not notebook_pictures(json.loads((ROOT / n).read_text(encoding='utf-8')))]
    assert unused == [], 'allowed to hold pictures, holds none'


@pytest.fixture
def jpeg():
    from io import BytesIO

    from PIL import Image
    out = BytesIO()
    Image.effect_noise((64, 64), 50).save(out, 'JPEG')
    return out.getvalue()


def repository(folder, **files):
    "A small git repository with some files in it."
    subprocess.run(['git', 'init', '-q', folder], check=True)
    for name, data in files.items(): (folder / name.replace('__', '.')).write_bytes(data)
    return folder


def test_a_planted_jpeg_is_found_under_any_name(tmp_path, jpeg):
    planted = repository(tmp_path, photo__jpg=jpeg, notes__txt=jpeg, innocent__md=b'# fine\n')
    assert {f.split(':')[0] for f in findings(project_files(planted))} == {'photo.jpg', 'notes.txt'}


def test_a_planted_picture_in_text_and_in_a_notebook_is_found(tmp_path, jpeg):
    inline = b'data:image/jpeg;base64,' + base64.b64encode(jpeg)
    output = dict(output_type='display_data', metadata={}, data={'image/png': 'iVBORw0KGgo='})
    html = dict(output_type='display_data', metadata={}, data={'text/html': ['<img src="', inline.decode(), '">']})
    nb = lambda o: json.dumps(dict(cells=[dict(cell_type='code', source=[], outputs=[o])])).encode()
    planted = repository(tmp_path, page__html=b'<img src="' + inline + b'">', a__ipynb=nb(output), b__ipynb=nb(html))
    assert {f.split(':')[0] for f in findings(project_files(planted))} == {'page.html', 'a.ipynb', 'b.ipynb'}
    assert not [f for f in findings(project_files(planted), allowed_outputs={'a.ipynb': 'a chart'})
                if f.startswith('a.')]


def test_planted_weights_are_found_under_any_name(tmp_path):
    import numpy as np
    import torch
    from safetensors.numpy import save
    torch.save({'w': torch.zeros(3)}, tmp_path / 'w')
    planted = repository(tmp_path, a__txt=save({'w': np.zeros(3, 'float32')}), b__txt=(tmp_path / 'w').read_bytes())
    assert {f.split(':')[0] for f in findings(project_files(planted))} == {'a.txt', 'b.txt', 'w'}
