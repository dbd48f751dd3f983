"""Where images come from: CIFAR-10, a folder, Parquet files, and digits that need no download.

Every source keeps to the same rules. Labels serve measurement only. An image that cannot be read is named, left out
and recorded, and above `max_bad` the run stops; nothing is ever put in its place. JPEG, PNG and WebP are decoded, up
to 89,478,485 pixels (Pillow's limit against decompression bombs) and 1 GiB per file. EXIF orientation is applied,
transparency is laid on white, 16-bit grey is scaled to 8 bits, of 16-bit colours the higher byte is taken, CMYK and
palettes become RGB by Pillow's plain formulas, colour profiles are not applied, and of an animation the first frame is
taken. NumPy and TIFF files of 1 to 16 bands are read where `channels`, `bands` and `value_range` say how they become
8-bit. An image that changes or goes while a run reads it from its file ends the run.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, SerializeAsAny, model_validator

from sslkit.api import DataInfo, DataSource, FileReader, ImageSet, Incidental, Look, slot

__all__ = ["CIFAR10", "Digits", "Folder", "Parquet", "Subset", "WebDataset"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _unless(default: object) -> AfterValidator:
    """Saying what goes without saying is the same recipe, with the same hash."""
    return AfterValidator(lambda value: None if value == default else value)


def _ascending(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and not value[0] < value[1]:
        raise ValueError("should be two numbers, the smaller first")
    return value


Channels = Annotated[int, Field(ge=1, le=16)]
Bands = Annotated[tuple[NonNegativeInt, ...] | None, Field(min_length=1, max_length=16)]
ValueRange = Annotated[tuple[float, float] | None, AfterValidator(_ascending)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
CropsFrom = Annotated[Literal["square", "original"] | None, _unless("square")]
Check = Annotated[Literal["full", "headers"] | None, _unless("full")]


T = TypeVar("T")


def _fitting(spec: T, bands: tuple[int, ...] | None, channels: int) -> T:
    if bands is not None and len(bands) != channels:
        raise ValueError(f"bands: names {len(bands)} bands, and channels is {channels}; there should be as many")
    return spec


class CIFAR10(DataSource):
    """CIFAR-10: 50,000 training and 10,000 test images of 10 classes, 32 x 32 pixels.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). Found in `root` as (in this order)
    the folder `cifar-10-batches-py/`, the archive `cifar-10-python.tar.gz`, or `train*.parquet` and `test*.parquet`
    in the layout of Hugging Face image data sets; otherwise the archive is downloaded (170 MB). The batches are pickle
    files: they are opened only where their MD5 is the official one. The archive is read, never unpacked.
    """

    root: Annotated[str | None, Incidental] = None
    """Folder that holds the files; relative to the working directory. Without it `$SSLKIT_DATA/cifar10`, where
    `SSLKIT_DATA` is by default `~/.cache/sslkit`."""
    download: Annotated[bool, Incidental] = True
    """Download the archive if `root` holds none of the three layouts."""

    def build(self, info: DataInfo) -> ImageSet:
        from sslkit_datasets.cifar10 import open_cifar10

        return open_cifar10(self, info)


class Folder(DataSource):
    """JPEG, PNG and WebP files in a folder, with or without one folder per class.

    A folder of folders is read as classes: the sorted names of the folders are the class names, and images may lie at
    any depth below them. A folder of images alone has no labels. `train/` beside `test/` or `val/` inside `root` are
    taken as the two sets. Hidden files are passed over; files with other suffixes and class folders without images are
    left out and mentioned. So are NumPy and TIFF files beside pictures; fewer pictures than these are an error.

    Each image is resized once, to `size` x `size`: its largest central square, by antialiased bicubic interpolation.
    Every file is read and decoded in full when the source is opened, so broken ones are known before the first step.
    Images that fit into `memory_limit_gb` then stay in memory; others are decoded again whenever they are read, and
    the result of the check is remembered in the cache folder for as long as no name, size or time of a file changes.
    """

    root: Annotated[str, Incidental]
    """Folder of the training images, or of `train/` and `test/` (or `val/`); relative to the working directory."""
    size: PositiveInt
    """Side of the stored images, in pixels. Views are cut from these, so choose it no smaller than the views."""
    test_root: Annotated[str | None, Incidental] = None
    """Folder of the test images, if they do not lie in `root`."""
    classes: Annotated[Literal["auto", "none"] | None, _unless("auto")] = None
    """`"none"`: folders mean nothing, images may lie anywhere below `root`, and there are no labels; `train/` and
    `test/` are folders like any others. Without it, folders are classes and sets as said above."""
    hold_out: Annotated[Share | None, _unless(0.0)] = None
    """About this share of each class becomes the test set and is not trained on; of all images where there are no
    classes. On which side an image is follows from its bytes alone, so images that are added move no others, and
    copies stay together. At least one image of each class of two or more is on either side."""
    crops_from: CropsFrom = None
    """`"original"`: views are cut from the images as they lie in their files, with their own sides, and decoded for
    every step; the squares of `size` are for measurement alone. Without it, or with `"square"`, views are cut from the
    squares."""
    check: Check = None
    """`"headers"`: opening reads the header of each file only, which takes minutes less per million files, and nothing
    is kept in memory. A file that then cannot be decoded ends the run, and the data set is known by the length and the
    first 64 KiB of each file. Without it, or with `"full"`, every file is decoded."""
    channels: Channels = 3
    """3 for RGB (grey images are repeated), 1 for grey (colours are weighted by ITU-R 601). Of NumPy and TIFF files,
    the number of bands, up to 16, which are taken as they are."""
    bands: Bands = None
    """Of NumPy and TIFF files, the bands to take, counted from 0, as many as `channels`: `[3, 2, 1]`."""
    value_range: ValueRange = None
    """What becomes 0 and 255 where values are not 8-bit: `[0, 4095]`; what lies outside is clipped. NumPy and TIFF
    files of 16 bits or float32 need it. 16-bit grey PNG files use it; without it, they are divided by 257."""
    axes: Literal["hwc", "chw"] | None = None
    """Of NumPy and TIFF files, whether bands come last or first; without it, the side of 16 or less is the bands."""
    max_bad: Annotated[Fraction, Incidental] = 0.001
    """Largest share of either set that may be unreadable; above it the run stops."""
    memory_limit_gb: Annotated[PositiveFloat, Incidental] = 4.0
    """Keep the decoded images in memory if both sets together take at most this many gigabytes (10^9 bytes). With
    `crops_from = "original"` the squares that were measured are kept, up to this for each set."""
    workers: Annotated[PositiveInt | None, Incidental] = None
    """Threads that decode; without it, one per CPU core."""

    @model_validator(mode="after")
    def _one_band_for_each_channel(self) -> Self:
        return _fitting(self, self.bands, self.channels)

    def build(self, info: DataInfo) -> ImageSet:
        from sslkit_datasets.folder import open_folder

        return open_folder(self, info)

    def look(self, info: DataInfo, limit: int = 0) -> Look:
        from sslkit_datasets.look import look_at

        return look_at(self, info, limit)

    def reader(self) -> FileReader:
        from sslkit_datasets.folder import preparation
        from sslkit_datasets.one_file import Reader

        return Reader(preparation(self))


class Parquet(DataSource):
    """Images in Parquet files, in the layout of Hugging Face image data sets.

    One row is one image: a column of encoded JPEG, PNG or WebP files (`struct<bytes, path>` or binary) and, perhaps, a
    column of integer labels. Class names are taken from the schema's metadata where they are given. Labels that are
    all -1 mean that there are none. Shards are read in the order of their names, and a missing one
    (`train-00001-of-00002.parquet`) is an error. The decoded images stay in memory; with `stream`, the files are read
    a row group at a time, all through the run.
    """

    path: Annotated[str, Incidental]
    """A file, a glob such as `data/train-*.parquet`, or a folder; relative to the working directory. In a folder,
    `train*.parquet` is the training set and `test*.parquet`, `validation*.parquet` or `val*.parquet` the test set; a
    folder without `train*.parquet` is a training set altogether."""
    test_path: Annotated[str | None, Incidental] = None
    """File, glob or folder of the test images, if they do not lie beside the training images."""
    image_column: str | None = None
    """Column of the images; without it, `img` or `image`."""
    label_column: str | None = None
    """Column of the labels; without it, `label` or `labels`, and no labels where neither exists."""
    size: PositiveInt | None = None
    """Resize each image's largest central square to this side in pixels (antialiased bicubic). Without it all images
    must have one size and keep it."""
    channels: Channels = 3
    """3 for RGB (grey images are repeated), 1 for grey (colours are weighted by ITU-R 601). Of NumPy and TIFF files,
    the number of bands, up to 16, which are taken as they are."""
    bands: Bands = None
    """Of NumPy and TIFF files, the bands to take, counted from 0, as many as `channels`: `[3, 2, 1]`."""
    value_range: ValueRange = None
    """What becomes 0 and 255 where values are not 8-bit: `[0, 4095]`; what lies outside is clipped. NumPy and TIFF
    files of 16 bits or float32 need it. 16-bit grey PNG files use it; without it, they are divided by 257."""
    axes: Literal["hwc", "chw"] | None = None
    """Of NumPy and TIFF files, whether bands come last or first; without it, the side of 16 or less is the bands."""
    max_bad: Annotated[Fraction, Incidental] = 0.001
    """Largest share of either set that may be unreadable; above it the run stops."""
    memory_limit_gb: Annotated[PositiveFloat, Incidental] = 16.0
    """Stop with an error rather than fill the memory if the decoded images take more gigabytes (10^9 bytes) per set."""
    hold_out: Annotated[Share | None, _unless(0.0)] = None
    """About this share of each class becomes the test set and is not trained on; of all images where there are no
    classes. On which side an image is follows from its bytes alone, so images that are added move no others, and
    copies stay together. At least one image of each class of two or more is on either side."""
    stream: Annotated[bool | None, _unless(False)] = None
    """Read row groups as they are wanted, for sets that do not fit into memory. Views are then cut from the images
    with their own sides, and the squares of `size`, which is needed, are for measurement alone. The result of the
    check of all images is remembered in the cache folder for as long as no file changes."""
    window: PositiveInt | None = None
    """With `stream`: row groups are read one after the other, and an image changes places with those up to this many
    images away; without it, 16,384."""
    cache_gb: Annotated[PositiveFloat, Incidental] = 4.0
    """With `stream`: the row groups of the files of each set that are held at most, in gigabytes (10^9 bytes) of image
    files. A window that does not fit is refused."""
    check: Check = None
    """With `stream`, `"headers"`: opening reads the header of each image only. An image that then cannot be decoded
    ends the run, and the data set is known by the length and the first 64 KiB of each image. Without it, or with
    `"full"`, every image is decoded once."""
    workers: Annotated[PositiveInt | None, Incidental] = None
    """Threads that decode; without it, one per CPU core."""

    @model_validator(mode="after")
    def _one_band_for_each_channel(self) -> Self:
        return _fitting(self, self.bands, self.channels)

    def build(self, info: DataInfo) -> ImageSet:
        if self.stream:
            from sslkit_datasets.rows import open_stream

            return open_stream(self, info)
        from sslkit_datasets.parquet import open_parquet

        return open_parquet(self, info)


class WebDataset(DataSource):
    """Images in tar shards of the WebDataset format, read where they lie and never unpacked.

    Members beside one another whose names agree up to the first dot are one sample: `000017.jpg` and `000017.cls`.
    The shards are indexed once, which needs their headers alone; the index and what the check of all images found are
    remembered in the cache folder for as long as no shard changes. Each image is then read from its place in its
    shard, so the order of an epoch is a shuffle of all images, and a resumed run goes on at the very image. Views are
    cut from the images with their own sides. Nothing in a shard is run or unpickled, no name in it is used as a path,
    and links, devices and sparse members are passed over. Compressed shards (`.tar.gz`) cannot be read from the middle
    and are refused.

    Format: Aizman, Maltby and Breuel, "High Performance I/O For Large Scale Deep Learning" (2019), arXiv:2001.01858.
    """

    path: Annotated[str, Incidental]
    """A file, a glob, a range such as `data/train-{000000..000146}.tar`, or a folder; relative to the working
    directory. In a folder, `train*.tar` is the training set and `test*.tar` or `val*.tar` the test set; a folder
    without `train*.tar` is a training set altogether."""
    size: PositiveInt
    """Side of the squares that are measured, in pixels: each image's largest central square, resized."""
    test_path: Annotated[str | None, Incidental] = None
    """File, glob, range or folder of the test images, if they do not lie beside the training images."""
    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Extensions of the images: what follows the first dot of a member's name. A sample without any counts as broken,
    one with two is an error."""
    label: Annotated[str, Field(pattern=r"^(none|[^.:]+|json:.+)$")] = "cls"
    """Where the label is: the extension of a member that holds a number or a name, or `json:KEY` for a key of the
    member `.json`. Names are numbered in their sorted order. `"none"` reads none."""
    hold_out: Annotated[Share | None, _unless(0.0)] = None
    """About this share of each class becomes the test set and is not trained on; of all images where there are no
    classes. On which side an image is follows from its bytes alone, so images that are added move no others, and
    copies stay together. At least one image of each class of two or more is on either side."""
    window: PositiveInt | None = None
    """Without it, an epoch is a shuffle of all images, each read by itself: for shards on an SSD. With it, shards are
    read in pieces of 16 MiB, one after the other, and an image changes places with those up to `window` images away:
    for disks and network drives."""
    cache_gb: Annotated[PositiveFloat, Incidental] = 4.0
    """With `window`, the pieces of the shards of each set that are held at most, in gigabytes (10^9 bytes). A window
    that does not fit is refused."""
    channels: Channels = 3
    """3 for RGB (grey images are repeated), 1 for grey (colours are weighted by ITU-R 601). Of NumPy and TIFF files,
    the number of bands, up to 16, which are taken as they are."""
    bands: Bands = None
    """Of NumPy and TIFF files, the bands to take, counted from 0, as many as `channels`: `[3, 2, 1]`."""
    value_range: ValueRange = None
    """What becomes 0 and 255 where values are not 8-bit: `[0, 4095]`; what lies outside is clipped. NumPy and TIFF
    files of 16 bits or float32 need it. 16-bit grey PNG files use it; without it, they are divided by 257."""
    axes: Literal["hwc", "chw"] | None = None
    """Of NumPy and TIFF files, whether bands come last or first; without it, the side of 16 or less is the bands."""
    check: Check = None
    """`"headers"`: opening reads the header of each image only. An image that then cannot be decoded ends the run, and
    the data set is known by the length and the first 64 KiB of each image. Without it, or with `"full"`, every image
    is decoded once."""
    max_bad: Annotated[Fraction, Incidental] = 0.001
    """Largest share of either set that may be unreadable; above it the run stops."""
    workers: Annotated[PositiveInt | None, Incidental] = None
    """Threads that decode; without it, one per CPU core."""

    @model_validator(mode="after")
    def _one_band_for_each_channel(self) -> Self:
        return _fitting(self, self.bands, self.channels)

    def build(self, info: DataInfo) -> ImageSet:
        from sslkit_datasets.webdataset import open_webdataset

        return open_webdataset(self, info)


class Digits(DataSource):
    """Real handwritten digits printed in random inks under slanting light: a demonstration that needs no download.

    The 1,797 scans (8 x 8 pixels) come with scikit-learn: `load_digits`, from the UCI set "Optical Recognition of
    Handwritten Digits" (Alpaydin and Kaynak 1998). 1,347 scans are for training and 450 for testing. Each is enlarged
    to 14 pixels, placed in a 16 x 16 image up to one pixel off the centre, and printed several times. Each print has
    its own paper colour, U(0.2, 1) per channel; ink, paper x (1 - 0.5 U(0.5, 1)) per channel; linear light, brighter or
    darker by U(-50%, 50%) from the centre to the edge in a random direction; and noise of standard deviation 0.02.
    Prints of one scan never lie in both sets.

    What to know before quoting a figure: the colours and the light are made up, so that raw pixels say little about
    the digit (kNN accuracy about 0.39) while a method that learns to ignore them does well. Undoing most of it by hand
    is easy: subtracting each image's mean per channel already lifts pixel kNN to about 0.77 (k 20, temperature 0.1,
    cosine, default options; 0.36 to 0.40 and 0.76 to 0.80 over seeds 0 to 3). The set shows that a method learns, and
    does not rank methods.
    """

    prints: PositiveInt = 8
    """Prints of each training scan."""
    test_prints: PositiveInt = 2
    """Prints of each test scan."""
    seed: NonNegativeInt = 0
    """Seed of the split and of the prints. It is separate from the run's seed, so that runs which differ in their seed
    see the same data."""

    def build(self, info: DataInfo) -> ImageSet:
        from sslkit_datasets.digits import open_digits

        return open_digits(self)


class Subset(DataSource):
    """Some of another source's training images, drawn at random; its test images stay as they are.

    For runs that are to be short, and for asking how much a method needs. The images are drawn without replacement and
    keep their order.
    """

    of: Annotated[SerializeAsAny[DataSource], slot("data_source")]
    """The source: `{ use = "cifar10" }`."""
    images: PositiveInt
    """How many training images to keep."""
    seed: NonNegativeInt = 0
    """Seed of the draw. It is separate from the run's seed, so that runs which differ in their seed see the same
    images."""

    def build(self, info: DataInfo) -> ImageSet:
        from sslkit_datasets.subset import draw

        return draw(self, info)
