"""A residual network of the family in Keras: build, compile, fit, evaluate, save, load. Needs `pip install 'reslab[keras]'`.

python examples/keras_digits.py            under a minute on one core; prints the accuracy on test images it never trained on
"""

import tempfile
from pathlib import Path

import reslab
from reslab.data.keras import KerasImages
from reslab.data.source import open_images
from reslab.data.split import split
from reslab.nets.keras import build, keras, load

EPOCHS = 7
BATCH = 64

keras.utils.set_random_seed(0)
images = split(open_images("digits"), seed=0)
train, test = KerasImages(images, "train", BATCH, seed=0), KerasImages(images, "test")

spec = reslab.spec("resnet20").fit(images.image_size, images.channels, len(images.classes))
model = build(spec, images.image_size)
model.compile(
    keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, EPOCHS * len(train)), momentum=0.9, nesterov=True, weight_decay=5e-4),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(train, epochs=EPOCHS, verbose=2)

with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder) / "digits.keras")
    model = load(Path(folder) / "digits.keras")
loss, accuracy = model.evaluate(test, verbose=0)
print(f"test accuracy {accuracy:.2%}, n = {len(test.items)}")
