import torch

from prototypes_lib import data
from prototypes_lib.backbones import Backbone
from prototypes_lib.evaluate import extract
from prototypes_lib.views import eval_view


def test_features_are_the_class_tokens_of_a_network_in_eval_mode_which_is_put_back():
    torch.manual_seed(0)
    backbone = Backbone("vit_pico_patch8", 32, drop_path_rate=0.5).train()
    images = data.load("cifar10-5k", "test", limit=20, progress=False)
    features = extract(backbone, images, batch_size=8)
    assert backbone.training
    with torch.no_grad():
        expected = backbone.eval()(eval_view(torch.from_numpy(images.pixels), 32))[0]
    assert torch.allclose(features.x, expected, atol=1e-5)
    assert features.labels.tolist() == images.labels.tolist()
