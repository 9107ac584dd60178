"""The catalog: what each data set is, how many images it has, under which terms, and whom to cite."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

WITHOUT_VAL = "train-without-val"  # the split "train" less "val", of sets whose "train" is the official train + val


@dataclass(frozen=True)
class Dataset:
    """One data set; `images` counts the images of each split as `data.load` returns it."""

    what: str
    images: Mapping[str, int]
    classes: int
    size: str  # of the download
    license: str  # status, as its makers state it
    citation: str
    home: str
    splits: str = "official train and test"
    checked: str = "MD5 of the files (torchvision)"


_ALL = {
    "cifar10-5k": Dataset(
        "embedded, class-balanced subset of CIFAR-10, 32 px; the default",
        {"train": 4_000, "test": 1_000},
        10,
        "10.8 MB, in the repository",
        "none stated for CIFAR-10; its authors ask to be cited",
        "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        splits="drawn from the official train and test images, 400 and 100 a class",
        checked="SHA-256 of the file and of the pixels",
    ),
    "cifar10": Dataset(
        "photographs of 10 kinds of objects and animals, 32 px",
        {"train": 50_000, "test": 10_000},
        10,
        "170 MB",
        "none stated; its authors ask to be cited",
        "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        checked="MD5 (torchvision); the npm copy by SHA-256 of pixels and labels",
    ),
    "cifar100": Dataset(
        "photographs of 100 kinds of objects, animals and plants, 32 px",
        {"train": 50_000, "test": 10_000},
        100,
        "169 MB",
        "none stated; its authors ask to be cited",
        "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "fashion-mnist": Dataset(
        "clothes, 28 px, gray (stored as three equal channels)",
        {"train": 60_000, "test": 10_000},
        10,
        "31 MB",
        "MIT",
        "Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv:1708.07747, 2017",
        "https://github.com/zalandoresearch/fashion-mnist",
    ),
    "stl10": Dataset(
        "10 kinds of objects and animals, 96 px, with many unlabeled images",
        {"train": 5_000, "test": 8_000, "unlabeled": 100_000},
        10,
        "2.6 GB",
        "none stated; images from ImageNet, whose terms allow non-commercial research",
        "Coates, Lee and Ng, An Analysis of Single-Layer Networks in Unsupervised Feature Learning, AISTATS 2011",
        "https://cs.stanford.edu/~acoates/stl10/",
        splits="official train and test; split='unlabeled' for pre-training (labels are -1)",
    ),
    "imagenette": Dataset(
        "ten easy classes of ImageNet; the version with a short side of 320 px",
        {"train": 9_469, "test": 3_925},
        10,
        "340 MB",
        "selection Apache-2.0; images from ImageNet, whose terms allow non-commercial research",
        "Howard, Imagenette, 2019",
        "https://github.com/fastai/imagenette",
        splits="official train and val",
    ),
    "tiny-imagenet": Dataset(
        "200 classes of ImageNet at 64 px",
        {"train": 100_000, "test": 10_000},
        200,
        "248 MB",
        "none stated; images from ImageNet, whose terms allow non-commercial research",
        "Le and Yang, Tiny ImageNet Visual Recognition Challenge, CS 231N, 2015",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        splits="official train and val (the test images' labels are not public)",
        checked="MD5 of the archive",
    ),
    "flowers102": Dataset(
        "flowers of 102 species common in the United Kingdom",
        {"train": 2_040, "test": 6_149, WITHOUT_VAL: 1_020, "val": 1_020},
        102,
        "345 MB",
        "none stated; images collected from the web, for research",
        "Nilsback and Zisserman, Automated Flower Classification over a Large Number of Classes, ICVGIP 2008",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        splits="train = official train + val, also apart; test = official test",
    ),
    "pets": Dataset(
        "cats and dogs of 37 breeds",
        {"train": 3_680, "test": 3_669},
        37,
        "810 MB",
        "CC BY-SA 4.0; the copyright of the images stays with their owners",
        "Parkhi, Vedaldi, Zisserman and Jawahar, Cats and Dogs, CVPR 2012",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        splits="official trainval and test",
    ),
    "food101": Dataset(
        "dishes of 101 kinds; the training labels are noisy on purpose",
        {"train": 75_750, "test": 25_250},
        101,
        "5.0 GB",
        "none stated; images from Foodspotting, use beyond scientific fair use is to be agreed with their owners",
        "Bossard, Guillaumin and Van Gool, Food-101, ECCV 2014",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
    "aircraft": Dataset(
        "aircraft of 100 model variants (FGVC-Aircraft)",
        {"train": 6_667, "test": 3_333, WITHOUT_VAL: 3_334, "val": 3_333},
        100,
        "2.8 GB",
        "non-commercial research only",
        "Maji, Kannala, Rahtu, Blaschko and Vedaldi, Fine-Grained Visual Classification of Aircraft, "
        "arXiv:1306.5151, 2013",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        splits="official trainval, also as train and val apart, and test",
        checked="number of images only: torchvision has no checksum for it",
    ),
    "dtd": Dataset(
        "textures described by 47 adjectives",
        {"train": 3_760, "test": 1_880, WITHOUT_VAL: 1_880, "val": 1_880},
        47,
        "625 MB",
        "for research purposes",
        "Cimpoi, Maji, Kokkinos, Mohamed and Vedaldi, Describing Textures in the Wild, CVPR 2014",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        splits="partition 1 of the official ten: train = train + val, also apart; test = test",
    ),
    "caltech101": Dataset(
        "101 kinds of objects, without the background class",
        {"train": 3_030, "test": 5_647},
        101,
        "137 MB",
        "CC BY 4.0",
        "Li, Andreeto, Ranzato and Perona, Caltech 101, CaltechDATA, 2022 (Fei-Fei et al., CVPRW 2004)",
        "https://data.caltech.edu/records/mzrjq-6wc02",
        splits="ours, as there is no official one: 30 images a class to train, the others to test, seed 0",
    ),
    "sun397": Dataset(
        "scenes of 397 kinds",
        {"train": 19_850, "test": 19_850},
        397,
        "39 GB",
        "none stated; images collected from the web, for research",
        "Xiao, Hays, Ehinger, Oliva and Torralba, SUN Database, CVPR 2010",
        "https://vision.princeton.edu/projects/2010/SUN/",
        splits="ours: 50 + 50 images a class as in the official partitions, which torchvision lacks, seed 0",
    ),
    "inaturalist-2018": Dataset(
        "species in the wild, long-tailed, 8,142 classes",
        {"train": 437_513, "test": 24_426},
        8_142,
        "120 GB",
        "non-commercial research and education; each photograph under its owner's terms",
        "Van Horn et al., The iNaturalist Species Classification and Detection Dataset, CVPR 2018",
        "https://github.com/visipedia/inat_comp/tree/master/2018",
        splits="the competition's train and val, by train2018.json and val2018.json",
    ),
}
DATASETS: Mapping[str, Dataset] = MappingProxyType(_ALL)
OFFICIAL_VAL = tuple(name for name, entry in DATASETS.items() if WITHOUT_VAL in entry.images)


def describe() -> str:
    """The catalog as text: one line a data set, then how to fetch one and how to use a folder of one's own."""
    rows = [("name", "train", "test", "classes", "download", "what")]
    for name, entry in DATASETS.items():
        train, test = f"{entry.images['train']:,}", f"{entry.images['test']:,}"
        rows.append((name, train, test, f"{entry.classes:,}", entry.size.split(",")[0], entry.what))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    align = [str.ljust, str.rjust, str.rjust, str.rjust, str.rjust]
    lines = ["  ".join([*(align[i](row[i], widths[i]) for i in range(5)), row[5]]) for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            "Fetch one:     prototypes data NAME   (license and citation are shown first)",
            "Your own:      any folder CLASS/image.jpg, or train/ and val/ of such folders (ImageNet)",
            "Long-tailed:   NAME-lt-FACTOR, for example cifar10-lt-100: training classes from n to n / 100 images",
        ]
    )


def about(name: str) -> str:
    """Everything the catalog knows of one data set, one fact a line."""
    entry = DATASETS[name]
    images = ", ".join(f"{split} {count:,}" for split, count in entry.images.items())
    facts = {
        name: entry.what,
        "images": f"{images}; {entry.classes:,} classes",
        "splits": entry.splits,
        "download": entry.size,
        "checked": entry.checked,
        "license": entry.license,
        "cite": entry.citation,
        "home": entry.home,
    }
    return "\n".join(f"{key + ':':<12} {value}" for key, value in facts.items())
