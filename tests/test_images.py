"""What files can hold: every fault of the pixels has its outcome, and what is stored is what a person would see."""
import io
import os
import platform
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fault_server import jpeg
from PIL import Image, ImageCms, PngImagePlugin

from vegc.data import images
from vegc.data.images import ImageProblem, load_rgb, phash, phash_mirrored, prepare


def encoded(im, fmt, **kw):
    out = io.BytesIO()
    im.save(out, fmt, **kw)
    return out.getvalue()


def photo(seed=0, size=(160, 120)): return load_rgb(jpeg(seed, size, quality=98))
def code(data, **kw):
    try: return prepare(data, **kw).flags
    except ImageProblem as e: return e.code


def far(a, b): return np.abs(np.asarray(a, int) - np.asarray(b, int)).mean()
def stored(data, **kw): return Image.open(io.BytesIO(prepare(data, **kw).data))


def png_bomb(w, h):
    "A PNG of one colour, w×h pixels of one bit, without ever holding them."
    pack, row = zlib.compressobj(9), bytes(1 + (w + 7)//8)
    idat = b''.join(pack.compress(row*100) for _ in range(h//100)) + pack.flush()
    def chunk(name, body):
        return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 1, 0, 0, 0, 0))
        + chunk(b'IDAT', idat)
        + chunk(b'IEND', b'')
    )


# --- whole or not

@pytest.mark.parametrize(
    'kw', [{}, dict(progressive=True), dict(subsampling=0), dict(restart_marker_rows=1), dict(optimize=True)], ids=str
)
def test_a_truncated_jpeg_is_named_at_any_length(kw):
    whole = jpeg(1, **kw)
    assert code(whole) == ()
    for n in (len(whole) - 1, len(whole) - 2, len(whole) - 40, len(whole) // 2, len(whole) // 4):
        assert code(whole[:n]) == 'truncated', n
    assert code(whole + b'trailing junk') == ()


@pytest.mark.parametrize('fmt', ['PNG', 'WEBP', 'GIF', 'AVIF', 'BMP', 'TIFF'])
def test_other_formats_cut_short_are_refused(fmt):
    whole = encoded(photo(), fmt)
    assert code(whole) == ()
    for part in (.5, .9): assert code(whole[:int(len(whole)*part)]) in ('truncated', 'corrupt'), part


def damaged(data, at, n, seed):
    noise = np.random.default_rng(seed).integers(0, 256, n, dtype='uint8').tobytes()
    return data[:at] + noise + data[at + n:]


def test_bytes_corrupted_in_the_middle_are_refused_or_flagged():
    whole = jpeg(1, (400, 300), quality=92)
    caught = [code(damaged(whole, int(len(whole)*at), 200, i)) != () for i, at in enumerate(np.linspace(.2, .8, 50))]
    assert np.mean(caught) > .9, np.mean(caught)
    png = encoded(photo(), 'PNG')
    assert all(code(damaged(png, int(len(png)*at), 20, i)) == 'corrupt' for i, at in enumerate(np.linspace(.2, .8, 20)))


def busy(seed, size=(700, 500), **kw):
    "A JPEG with detail everywhere, larger than what is stored."
    fine = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (50, 70, 3), dtype='uint8')).resize(
        size, Image.Resampling.BICUBIC
    )
    return encoded(Image.blend(photo(seed, size), fine, .4), 'JPEG', **(dict(quality=90) | kw))


@pytest.mark.parametrize(
    'n, kw, least',
    [
        (100, {}, 0.75),
        (200, {}, 0.87),
        (1000, {}, 0.98),
        (200, dict(restart_marker_rows=4), 0.6),
        (200, dict(size=(400, 300)), 0.92),
        (1000, dict(progressive=True), 0.9),
    ],
    ids=str,
)
def test_damage_is_noticed_as_often_as_was_measured(n, kw, least):  # 83, 92, 100, 70, 98 and 98 %
    whole = [busy(i, **kw) for i in range(4)]
    assert {code(w) for w in whole} == {()}
    caught = [code(damaged(w, int(len(w)*(.2 + .01*i)), n, i)) != () for i in range(60) for w in [whole[i % 4]]]
    assert np.mean(caught) >= least, np.mean(caught)


def test_damage_is_noticed_above_a_black_bar_and_in_the_first_of_two_photographs():
    for kw in (dict(format='JPEG'), dict(format='MPO', save_all=True, append_images=[photo(1, (200, 150))])):
        caught = []
        for seed in range(4):
            bar = photo(seed, (400, 300))
            bar.paste((0, 0, 0), (0, 270, 400, 300))
            bar.save(out := io.BytesIO(), quality=92, **kw)
            assert code(whole := out.getvalue()) == ()
            end = whole.index(b'\xff\xd9')
            caught += [code(damaged(whole, int(end*(.2 + .02*i)), 60, i)) != () for i in range(25)]
        assert np.mean(caught) > 0.72, np.mean(
            caught
        )  # 82 %; 57 where a black row is taken for one that is not painted yet


def test_a_lost_or_repeated_part_between_restart_markers_is_noticed():
    whole = jpeg(1, (320, 240), restart_marker_rows=1)
    at = [i for i in range(len(whole)) if whole[i] == 255 and 0xD0 <= whole[i + 1] <= 0xD7]
    assert code(whole) == () and [whole[i + 1] - 0xD0 for i in at] == [i % 8 for i in range(14)]
    one, last, end = whole[at[4]:at[5]], at[-1], whole.index(b'\xff\xd9')
    assert (
        code(whole[: at[4]] + whole[at[5] :]) == code(whole[: at[5]] + one + whole[at[5] :]) == ('corrupt?',)
    )  # out of turn
    assert code(whole[:at[3]] + whole[at[11]:]) == ('corrupt?',)  # eight of them: the picture ends too early
    assert code(whole[:end] + b'\xff\xd6' + whole[end:]) == ()  # some encoders end with one more
    assert code(whole[:last] + whole[end:]) != ()


def test_good_pictures_are_not_called_corrupt():
    for seed in range(60):
        kw = [
            dict(quality=60),
            dict(subsampling=0),
            dict(progressive=True),
            dict(restart_marker_blocks=3),
            dict(optimize=True, quality=98),
        ][seed % 5]
        assert code(jpeg(seed, (64 + seed, 200 - seed), **kw)) == (), (seed, kw)
    assert code(encoded(Image.new('RGB', (64, 64)), 'JPEG')) == ('blank',)
    loud = photo(0, (640, 480)).point(lambda v: 255*(v > 110))  # pure colours, of which a second look is asked for
    for kw in (
        dict(quality=95),
        dict(quality=10),
        dict(progressive=True),
        dict(keep_rgb=True),
        dict(subsampling=0, quality=100),
    ):
        assert code(encoded(loud, 'JPEG', **kw)) == (), kw


@pytest.mark.parametrize(
    'data, want',
    [
        (b'', 'empty'),
        (b'<html>', 'not_image'),
        (b'<svg/>', 'not_image'),
        (b'hello', 'not_image'),
        (bytes(99), 'not_image'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n', 'not_image'),
        (b'\xff\xd8\xff\xe0', 'corrupt'),
        (b'\x89PNG\r\n\x1a\n', 'corrupt'),
    ],
)
def test_what_is_no_picture_is_named(data, want): assert code(data) == want


# --- shape

def test_shapes_are_refused_and_shape_comes_before_size():
    shape = lambda w, h: code(encoded(Image.effect_noise((w, h), 99).convert('RGB'), 'PNG'))
    assert [shape(1, 1), shape(15, 40), shape(3000, 2), shape(900, 100)] == [
        'too_small',
        'too_small',
        'aspect',
        'aspect',
    ]
    assert [shape(28, 28), shape(16, 128)] == [(), ()]
    assert code(jpeg(0, (100, 100)), max_pixels=9999) == 'too_many_pixels'


def test_bombs_are_refused_from_the_header_and_memory_stays_flat():
    small = png_bomb(30_000, 30_000)
    assert len(small) < 200_000
    program = ('import resource, sys; from vegc.data.images import ImageProblem, prepare\n'
               'data = sys.stdin.buffer.read(); peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
               'prepare(%r); before = peak()\n'
               'try: prepare(data)\n'
               'except ImageProblem as e: print(e.code, peak() - before)').replace('%r', repr(jpeg()))
    for data in (
        small,
        png_bomb(13_000, 13_000),
        png_bomb(8_000, 8_000),
    ):  # the last one Pillow would open without a word
        done = subprocess.run(
            [sys.executable, '-W', 'error', '-c', program], input=data, capture_output=True, check=True
        )
        word, kilobytes = done.stdout.split()
        assert word == b'too_many_pixels' and int(kilobytes) < 5_000


# --- what a person sees

@pytest.mark.parametrize('turn', range(1, 9))
def test_every_exif_orientation_ends_upright(turn):
    im, exif = photo(), Image.Exif()
    exif[0x0112] = turn
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how the camera would have stored it
    lying = im.transpose(Image.Transpose(back[turn])) if turn > 1 else im
    for fmt, kw in (('JPEG', dict(quality=95)), ('PNG', {}), ('WEBP', dict(lossless=True))):
        data = encoded(lying, fmt, exif=exif, **kw)
        assert far(stored(data), im) < 3 and far(load_rgb(data), im) < 3
        assert far(load_rgb(data, (60, 80)), load_rgb(encoded(im, 'PNG'), (60, 80))) < 3
        p = prepare(data, max_size=80)
        assert (p.width, p.height, p.original_width, p.original_height) == (80, 60, 160, 120)
        assert b'Exif' not in prepare(data).data and not Image.open(io.BytesIO(prepare(data).data)).getexif()


def test_sixteen_bits_keep_their_range():
    ramp = np.linspace(0, 65535, 256).astype('uint16')[None].repeat(32, 0)
    for data in (encoded(Image.fromarray(ramp), 'PNG'), encoded(Image.fromarray(ramp), 'TIFF')):
        for im in (stored(data), load_rgb(data)):
            assert far(im, np.arange(256)[None, :, None].repeat(32, 0).repeat(3, 2)) < 1


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'tRNS'])
def test_transparency_lies_on_white(mode):
    im = Image.new('RGBA', (40, 40), (200, 0, 0, 0))
    im.paste((0, 0, 200, 255), (0, 0, 20, 40))
    if mode == 'tRNS':  # one colour of an RGB picture is declared clear
        rgb = im.convert('RGB')
        data = encoded(rgb, 'PNG', transparency=(200, 0, 0))
    else: data = encoded(im.quantize(4) if mode == 'P' else im.convert(mode), 'PNG')
    for out in (stored(data), load_rgb(data)):
        assert out.mode == 'RGB' and out.getpixel((30, 20)) == (255, 255, 255) and sum(out.getpixel((10, 20))) < 300


@pytest.mark.parametrize(
    'fmt, mode, kw',
    [
        ('JPEG', 'CMYK', dict(quality=95)),
        ('JPEG', 'L', dict(quality=95)),
        ('PNG', 'L', {}),
        ('PNG', 'P', {}),
        ('PNG', '1', {}),
        ('WEBP', 'RGB', dict(quality=95)),
        ('AVIF', 'RGB', dict(quality=95)),
        ('GIF', 'P', {}),
        ('BMP', 'RGB', {}),
        ('TIFF', 'CMYK', {}),
    ],
)
def test_every_mode_becomes_rgb_of_the_same_look(fmt, mode, kw):
    im = photo().convert(mode)
    for out in (stored(encoded(im, fmt, **kw)), load_rgb(encoded(im, fmt, **kw))):
        assert out.mode == 'RGB' and far(out, im.convert('RGB')) < 4


@pytest.mark.parametrize('fmt', ['GIF', 'PNG', 'WEBP'])
def test_of_an_animation_the_first_frame_is_taken(fmt):
    frames = [Image.new('RGB', (40, 40), c) for c in ('red', 'lime')]
    data = encoded(
        frames[0], fmt, save_all=True, append_images=frames[1:], **({'lossless': True} if fmt == 'WEBP' else {})
    )
    out = stored(data)
    assert far(out, frames[0]) < 3 and getattr(out, 'n_frames', 1) == 1 and len(prepare(data).data) < 400


def test_a_profile_that_is_not_srgb_is_converted_and_srgb_is_left():
    # red and blue exchanged: a profile nobody can take for sRGB
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    swapped = srgb.replace(b'rXYZ', b'tmp!', 1).replace(b'bXYZ', b'rXYZ', 1).replace(b'tmp!', b'bXYZ', 1)
    im = Image.new('RGB', (40, 40), (220, 20, 20))
    plain = encoded(im, 'JPEG', icc_profile=srgb)
    assert prepare(plain).data == plain
    r, _, b = stored(encoded(im, 'JPEG', icc_profile=swapped)).getpixel((9, 9))
    assert b > r + 100
    assert far(load_rgb(encoded(im, 'JPEG', icc_profile=b'rubbish')), im) < 4


# --- what is stored

def test_bytes_that_fit_are_kept_but_for_metadata():
    exif = Image.Exif()
    exif[0x010e] = 'my-secret-house'
    for kw in ({}, dict(progressive=True)):
        bare = jpeg(3, **kw)
        assert prepare(bare).data == bare
        tagged = jpeg(3, exif=exif, comment=b'my-secret-comment', xmp=b'my-secret-xmp', **kw)
        data = prepare(tagged + b'my-secret-clip').data
        assert data == bare and b'secret' not in data
    text = PngImagePlugin.PngInfo()
    text.add_text('where', 'my-secret-house')
    data = prepare(encoded(photo(), 'PNG', pnginfo=text, exif=exif)).data
    assert b'secret' not in data and far(Image.open(io.BytesIO(data)), photo()) == 0


def test_colours_of_one_brightness_are_not_blank_though_bytes_that_are_kept_are_looked_at_in_grey():
    im = Image.new('RGB', (64, 64), (200, 0, 0))
    im.paste((0, 102, 0), (0, 0, 32, 64))
    assert np.ptp(np.asarray(im.convert('L'))) <= 1
    for kw in ({}, dict(progressive=True)):
        p = prepare(encoded(im, 'JPEG', quality=95, **kw))
        assert p.flags == () and p.data == encoded(im, 'JPEG', quality=95, **kw)
    assert prepare(encoded(Image.new('RGB', (64, 64), (200, 0, 0)), 'JPEG')).flags == ('blank',)
    near = [(int(prepare(d).phash, 16) ^ int(phash(load_rgb(d)), 16)).bit_count() for d in map(jpeg, range(20))]
    assert max(near) <= 16, near  # rounding


def test_colours_that_libjpeg_cannot_sample_are_found_though_grey_could_be_read():
    data = bytearray(jpeg(0, (160, 120)))
    at = (
        data.index(b'\xff\xc0') + 11
    )  # the sampling of the first component: 2×2 becomes 3×2, and the others' 1×1 becomes 2×1
    data[at], data[at + 3], data[at + 6] = 0x32, 0x21, 0x21
    with pytest.raises(OSError): Image.open(io.BytesIO(bytes(data))).load()
    assert code(bytes(data)) == 'corrupt'


def test_lossless_stays_lossless_and_lossy_becomes_jpeg():
    for fmt, kw in (('PNG', {}), ('BMP', {}), ('TIFF', {}), ('WEBP', dict(lossless=True))):
        p = prepare(encoded(photo(), fmt, **kw))
        assert p.ext == 'png' and far(Image.open(io.BytesIO(p.data)), photo()) == 0
    assert [prepare(encoded(photo(), f)).ext for f in ('WEBP', 'AVIF', 'JPEG')] == ['jpg']*3
    assert prepare(encoded(photo(), 'PNG'), max_size=100).ext == 'jpg'


def test_sizes_shrink_to_the_limit_and_never_grow():
    for size, want in {
        (160, 120): (160, 120),
        (1000, 750): (500, 375),
        (1001, 130): (500, 65),
        (500, 500): (500, 500),
        (28, 28): (28, 28),
    }.items():
        p = prepare(jpeg(0, size))
        assert (p.width, p.height) == want and (p.original_width, p.original_height) == size
    for small in (
        encoded(photo(size=(40, 30)), 'WEBP'),
        encoded(photo(size=(40, 30)).convert('L'), 'JPEG'),
        encoded(photo(size=(40, 30)).convert('RGBA'), 'PNG'),
    ):
        assert stored(small).size == (40, 30)  # also where the bytes cannot be kept
    # a draft-scaled decode is near a full one
    big = jpeg(5, (2400, 1800))
    assert far(stored(big), load_rgb(big).resize((500, 375), Image.Resampling.LANCZOS)) < 2
    assert far(load_rgb(big, 128), load_rgb(big).resize((128, 128), Image.Resampling.BICUBIC)) < 3


def pillow_resize(im, size): return im.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.)


@pytest.mark.skipif(
    platform.machine() not in ('x86_64', 'AMD64', 'arm64'), reason='cykooz_resizer has no wheel for this machine'
)
@pytest.mark.parametrize(
    'size', [(500, 375), (375, 500), (160, 120), (97, 31), (31, 97), (799, 601), (1000, 800)], ids=str
)
def test_the_fast_change_of_size_gives_the_picture_that_pillow_gives(size, monkeypatch):
    fine = Image.fromarray(np.random.default_rng(0).integers(0, 255, (301, 400, 3), dtype='uint8')).resize(
        (801, 603), Image.Resampling.BICUBIC
    )
    fast, want = images.resized(fine, size), pillow_resize(fine, size)
    others = [
        far(fine.resize(size, r, reducing_gap=2.0), want)
        for r in (Image.Resampling.BILINEAR, Image.Resampling.HAMMING, Image.Resampling.LANCZOS)
    ]
    assert images.FAST_RESIZE and fast.size == size and fast.mode == 'RGB'
    assert far(fast, want) <= .5 and far(fast, want) < min(others)/3
    assert far(images.resized(fine, (1, 1)), pillow_resize(fine, (1, 1))) <= 1
    monkeypatch.setattr(images, 'FAST_RESIZE', False)
    assert images.resized(fine, size).tobytes() == want.tobytes()


def test_threads_change_sizes_at_the_same_time():
    ims = [photo(i, (640 + i, 480)) for i in range(16)]
    want = [images.resized(im, (500, 375)).tobytes() for im in ims]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda im: images.resized(im, (500, 375)).tobytes(), ims * 4)) == want * 4


@pytest.mark.parametrize(
    'setup', ["sys.modules['cykooz_resizer'] = None", "import PIL.Image; PIL.__version__ = '99.0.0'"]
)
def test_pillow_shrinks_where_the_fast_library_is_missing_or_was_not_tried(setup, tmp_path):
    (tmp_path/'a.jpg').write_bytes(jpeg(2, (900, 700)))
    code = (
        f'import sys; {setup}; from vegc.data import images; assert not images.FAST_RESIZE\n'
        "print(images.prepare(open(sys.argv[1], 'rb').read()).phash)"
    )
    found = subprocess.run(
        [sys.executable, '-c', code, tmp_path / 'a.jpg'], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert (int(found, 16) ^ int(prepare(jpeg(2, (900, 700))).phash, 16)).bit_count() <= 6


@pytest.mark.parametrize('how', ['missing', 'forbidden'])
def test_without_a_file_in_memory_the_same_bytes_are_made(how, monkeypatch):
    want = prepare(jpeg(1, (800, 600))).data, prepare(encoded(photo(), 'GIF')).data
    def no(name): raise OSError(38, 'Function not implemented')
    if how == 'missing': monkeypatch.delattr(os, 'memfd_create', raising=False)
    else: monkeypatch.setattr(os, 'memfd_create', no, raising=False)
    assert (prepare(jpeg(1, (800, 600))).data, prepare(encoded(photo(), 'GIF')).data) == want


def test_training_and_prediction_see_the_same_pixels(tmp_path):
    data = jpeg(4, (700, 500))
    (tmp_path/'a.jpg').write_bytes(data)
    a, b = load_rgb(tmp_path/'a.jpg', (96, 128)), load_rgb(data, (96, 128))
    assert a.size == (128, 96) and far(a, b) == 0 and far(load_rgb(str(tmp_path/'a.jpg'), (96, 128)), b) == 0
    with pytest.raises(ImageProblem, match='not_image'): load_rgb(b'nothing')
    with pytest.raises(FileNotFoundError): load_rgb(tmp_path/'b.jpg')


def test_near_copies_hash_alike_and_others_do_not():
    bits = lambda a, b: (int(a, 16) ^ int(b, 16)).bit_count()
    def busy(seed):  # a photograph has some energy in all of the frequencies that are hashed
        fine = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype='uint8')).resize(
            (320, 240), Image.Resampling.BICUBIC
        )
        return Image.blend(photo(seed, (320, 240)), fine, .4)
    hashes = [phash(busy(i)) for i in range(8)]
    assert min(bits(hashes[i], hashes[j]) for i in range(8) for j in range(i)) > 60
    for i, h in enumerate(hashes):
        assert len(h) == 64
        assert bits(h, phash(load_rgb(encoded(busy(i).resize((160, 120)), 'JPEG', quality=50)))) < 16
        assert (
            bits(phash_mirrored(h), phash(busy(i).transpose(Image.Transpose.FLIP_LEFT_RIGHT))) < 16
            and phash_mirrored(phash_mirrored(h)) == h
        )


def test_only_numpy_and_pillow_are_needed():
    others = {'torch', 'scipy', 'pandas', 'fastai', 'aiohttp', 'matplotlib', 'tqdm', 'fastcore'}
    code = f'import sys, vegc.data.images; print(*sorted({{m.split(".")[0] for m in sys.modules}} & {others}))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == ''
