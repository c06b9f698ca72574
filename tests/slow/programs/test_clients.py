"""Models as people train them: through a switch, saved on the way, and resumed."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from sequential_optimizer import PhaseLogger, SequentialOptimizer, SwitchOnPlateau
from tests.helpers.models import state_of
from tests.helpers.oracle import assert_same

layers = keras.layers
EPOCHS = 4
# Epochs after which a run is saved: before and after the switch in the third.
STOPS = (1, 3)


def load_model(path, saved):
    """Loads a model, and the state of its random layers, which Keras does not save."""
    loaded = keras.saving.load_model(path)
    resume_randomness(loaded, saved)
    return loaded


def resume_randomness(model, saved):
    """Lets random layers continue where those of the saved model are."""
    pairs = zip(model.variables, saved.variables, strict=True)
    states = [pair for pair in pairs if "seed_generator" in pair[1].path]
    assert states
    for variable, value in states:
        variable.assign(value)


def fit(model, data, start, stop):
    """Trains epochs `start` to `stop - 1`; returns the loss after each."""
    losses = []
    for epoch in range(start, stop):
        history = model.fit(
            *data,
            batch_size=32,
            initial_epoch=epoch,
            epochs=epoch + 1,
            shuffle=False,
            verbose=0,
        )
        losses += history.history["loss"]
    return losses


def adam_then_sgd(boundary, rate=1e-3):
    """Returns a sequence as people fine-tune with it."""
    decay = keras.optimizers.schedules.CosineDecay(0.05, 40)
    return SequentialOptimizer(
        [
            keras.optimizers.Adam(rate, name="adam"),
            keras.optimizers.SGD(decay, momentum=0.9, nesterov=True, name="sgd"),
        ],
        [boundary],
    )


@functools.cache
def digits():
    images, classes = load_digits(return_X_y=True)
    x = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    return x, classes.astype("int32")


# --- an image classifier, fine-tuned -------------------------------------------------


def make_classifier():
    """Returns a network trained on five digits, with a new head for all ten."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.RandomTranslation(0.1, 0.1),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
            layers.GlobalAveragePooling2D(),
        ],
        name="base",
    )
    x, y = digits()
    few = y < 5
    pretrained = keras.Sequential([base, layers.Dense(5)])
    pretrained.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    pretrained.fit(x[few][:320], y[few][:320], verbose=0)

    # As guides on transfer learning do: only the last convolution and the head.
    for layer in base.layers[:-2]:
        layer.trainable = False
    model = keras.Sequential([base, layers.Dropout(0.2), layers.Dense(10)])
    model.compile(
        adam_then_sgd(boundary=25, rate=1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


@pytest.fixture(scope="module")
def classifier_run():
    model, data = make_classifier(), [array[:320] for array in digits()]
    losses = fit(model, data, 0, EPOCHS)
    return state_of(model, model.optimizer), losses, data


@pytest.mark.parametrize("stop", STOPS)
def test_image_classifier_resumes(classifier_run, tmp_path, stop):
    state, losses, data = classifier_run
    model = make_classifier()
    fit(model, data, 0, stop)
    model.save(tmp_path / "model.keras")
    resumed = load_model(tmp_path / "model.keras", model)
    assert int(resumed.optimizer.phase) == int(stop == 3)
    assert fit(resumed, data, stop, EPOCHS) == losses[stop:]
    assert_same(state_of(resumed, resumed.optimizer), state)


def test_image_classifier_learns_through_the_switch(classifier_run):
    (_, optimizer_state), losses, _ = classifier_run
    assert losses[-1] < losses[0]
    assert int(optimizer_state[0]) == EPOCHS * 10
    # Frozen, so without slots: Adam has two for each of the 4 variables that train.
    assert len(optimizer_state) == 4 + (2 + 2 * 4) + (1 + 4)


# --- a text transformer --------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class TokenAndPosition(layers.Layer):
    """Embeds tokens and their positions; the gradients of both are sparse."""

    def __init__(self, length, words, width, **kwargs):
        super().__init__(**kwargs)
        self.sizes = length, words, width
        self.tokens = layers.Embedding(words, width)
        self.positions = layers.Embedding(length, width)

    def build(self, shape):
        self.tokens.build(shape)
        self.positions.build((self.sizes[0],))

    def call(self, x):
        return self.tokens(x) + self.positions(keras.ops.arange(self.sizes[0]))

    def get_config(self):
        length, words, width = self.sizes
        return {
            **super().get_config(),
            "length": length,
            "words": words,
            "width": width,
        }


WORDS = "a the film plot actor was is never not very good great fine bad dull poor"
GOOD, BAD = ("good", "great", "fine"), ("bad", "dull", "poor")
LENGTH = 8


@functools.cache
def reviews(count=320):
    """Returns reviews in which `not` and `never` reverse the sense of the next word."""
    rng = np.random.default_rng(0)
    words = WORDS.split()
    texts, labels = [], []
    for _ in range(count):
        text = rng.choice(words[:6], size=LENGTH - 2).tolist()
        negated, good = rng.integers(2, size=2)
        text += [rng.choice(["not", "never"] if negated else ["very", "is"])]
        text += [rng.choice(GOOD if good else BAD)]
        texts.append(" ".join(text))
        labels.append(int(good != negated))
    return tf.constant(texts), np.array(labels, np.float32)


def make_transformer():
    keras.utils.set_random_seed(0)
    vectorize = layers.TextVectorization(
        output_sequence_length=LENGTH, vocabulary=WORDS.split()
    )
    inputs = keras.Input((), dtype="string")
    x = TokenAndPosition(LENGTH, vectorize.vocabulary_size(), 16)(vectorize(inputs))
    attention = layers.MultiHeadAttention(2, 8, dropout=0.1)
    x = layers.LayerNormalization()(layers.Add()([x, attention(x, x)]))
    hidden = layers.Dense(16)(layers.Dense(32, activation="gelu")(x))
    x = layers.LayerNormalization()(layers.Add()([x, hidden]))
    x = layers.Dropout(0.1)(layers.Flatten()(x))
    model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))
    optimizer = SequentialOptimizer(
        [
            keras.optimizers.AdamW(5e-3, global_clipnorm=1.0, name="adamw"),
            keras.optimizers.SGD(0.05, momentum=0.9, clipnorm=1.0, name="sgd"),
        ],
        [25],
        use_ema=True,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    # Strings do not go into XLA.
    model.compile(optimizer, "binary_crossentropy", jit_compile=False)
    return model


@pytest.fixture(scope="module")
def transformer_run():
    model = make_transformer()
    losses = fit(model, reviews(), 0, EPOCHS)
    return state_of(model, model.optimizer), losses


@pytest.mark.parametrize("stop", STOPS)
def test_text_transformer_resumes(transformer_run, tmp_path, stop):
    state, losses = transformer_run
    model = make_transformer()
    fit(model, reviews(), 0, stop)
    model.save(tmp_path / "model.keras")
    resumed = load_model(tmp_path / "model.keras", model)
    # Not part of any optimizer's config, so it must be set again, as for plain AdamW.
    resumed.optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    assert fit(resumed, reviews(), stop, EPOCHS) == losses[stop:]
    assert_same(state_of(resumed, resumed.optimizer), state)
    assert losses[-1] < losses[0]


# --- a GAN with two sequences --------------------------------------------------------


class GAN(keras.Model):
    """Trains a generator against a discriminator, each with its own optimizer."""

    def __init__(self):
        super().__init__()
        self.discriminator = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Flatten(),
                layers.Dense(32),
                layers.LeakyReLU(),
                layers.Dense(1),
            ]
        )
        self.generator = keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dense(32, activation="relu"),
                layers.Dense(64, activation="sigmoid"),
                layers.Reshape((8, 8, 1)),
            ]
        )
        self.seeds = keras.random.SeedGenerator(1)
        self.loss_of_discriminator = keras.metrics.Mean(name="d_loss")
        self.loss_of_generator = keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer, g_optimizer, **kwargs):
        super().compile(**kwargs)
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer
        self.cross_entropy = keras.losses.BinaryCrossentropy(from_logits=True)

    @property
    def metrics(self):
        return [self.loss_of_discriminator, self.loss_of_generator]

    def train_step(self, real):
        real = real[0] if isinstance(real, tuple) else real
        count = keras.ops.shape(real)[0]
        noise = keras.random.normal((count, 8), seed=self.seeds)
        both = keras.ops.concatenate([self.generator(noise), real])
        is_fake = keras.ops.concatenate(
            [keras.ops.ones((count, 1)), keras.ops.zeros((count, 1))]
        )
        with tf.GradientTape() as tape:
            d_loss = self.cross_entropy(is_fake, self.discriminator(both))
        variables = self.discriminator.trainable_variables
        self.d_optimizer.apply(tape.gradient(d_loss, variables), variables)

        noise = keras.random.normal((count, 8), seed=self.seeds)
        with tf.GradientTape() as tape:
            judged = self.discriminator(self.generator(noise))
            g_loss = self.cross_entropy(keras.ops.zeros((count, 1)), judged)
        variables = self.generator.trainable_variables
        self.g_optimizer.apply(tape.gradient(g_loss, variables), variables)

        self.loss_of_discriminator.update_state(d_loss)
        self.loss_of_generator.update_state(g_loss)
        return {metric.name: metric.result() for metric in self.metrics}


def make_gan():
    keras.utils.set_random_seed(0)
    gan = GAN()
    # They switch at different updates.
    gan.compile(adam_then_sgd(15), adam_then_sgd(25))
    gan.d_optimizer.build(gan.discriminator.trainable_variables)
    gan.g_optimizer.build(gan.generator.trainable_variables)
    gan.built = True
    return gan


def train_gan(gan, start, stop):
    for _ in range(start, stop):
        gan.fit(digits()[0][:320], batch_size=32, shuffle=False, verbose=0)


def state_of_gan(gan):
    return state_of(gan, gan.d_optimizer, gan.g_optimizer)


@pytest.fixture(scope="module")
def gan_run():
    gan = make_gan()
    train_gan(gan, 0, EPOCHS)
    for optimizer, boundary in ((gan.d_optimizer, 15), (gan.g_optimizer, 25)):
        counts = [int(child.iterations) for child in optimizer.children]
        assert counts == [boundary, EPOCHS * 10 - boundary]
    return state_of_gan(gan)


@pytest.mark.parametrize("way", ["checkpoint", "weights_h5"])
# After the second epoch one of them has switched, and the other has not.
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_gan_with_two_sequences_resumes(gan_run, tmp_path, stop, way):
    gan, resumed = make_gan(), make_gan()
    train_gan(gan, 0, stop)
    if way == "checkpoint":
        path = tf.train.Checkpoint(model=gan).write(str(tmp_path / "gan"))
        tf.train.Checkpoint(model=resumed).read(path).assert_consumed()
    else:
        gan.save_weights(tmp_path / "gan.weights.h5")
        resumed.load_weights(tmp_path / "gan.weights.h5")
    resume_randomness(resumed, gan)
    phases = [int(o.phase) for o in (resumed.d_optimizer, resumed.g_optimizer)]
    assert phases == [[0, 0], [1, 0], [1, 1]][stop - 1]
    train_gan(resumed, stop, EPOCHS)
    assert_same(state_of_gan(resumed), gan_run)


# --- a custom train_step -------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Denoiser(keras.Model):
    """Learns to take noise away, with a penalty on its gradient in a `train_step`."""

    def __init__(self, width=16, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.encoder = layers.Dense(width, activation="relu")
        self.decoder = layers.Dense(64)

    def call(self, x):
        return self.decoder(self.encoder(x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x))
            loss += 1e-3 * tf.reduce_sum(tf.square(self.encoder.kernel))
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            metric.update_state(loss)
        return {metric.name: metric.result() for metric in self.metrics}

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@functools.cache
def noisy_digits():
    # Not by a random layer: a backup does not keep the state of one.
    clean = digits()[0][:320].reshape(-1, 64)
    noise = np.random.default_rng(0).normal(scale=0.3, size=clean.shape)
    return clean + noise.astype("float32"), clean


def make_denoiser():
    keras.utils.set_random_seed(0)
    model = Denoiser()
    optimizer = SequentialOptimizer(
        [
            keras.optimizers.Nadam(1e-2, name="nadam"),
            keras.optimizers.SGD(0.02, momentum=0.9, name="sgd"),
        ],
        [None],
        gradient_accumulation_steps=2,
    )
    model.compile(optimizer, "mse", jit_compile=True)
    model(noisy_digits()[0][:1])
    model.optimizer.build(model.trainable_variables)
    return model


class StopAfter(keras.callbacks.Callback):
    """Stands for a run that is killed."""

    def __init__(self, epochs):
        super().__init__()
        self._epochs = epochs

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self._epochs:
            raise KeyboardInterrupt


def train_denoiser(model, folder, callbacks=()):
    """Trains with a backup each epoch, and switches when the loss hardly falls."""
    model.fit(
        *noisy_digits(),
        batch_size=32,
        epochs=8,
        shuffle=False,
        verbose=0,
        callbacks=[
            SwitchOnPlateau(monitor="loss", patience=1, min_delta=0.01),
            PhaseLogger(),
            keras.callbacks.BackupAndRestore(folder / "backup"),
            *callbacks,
        ],
    )
    return model.history.history


@pytest.fixture(scope="module")
def denoiser_run(tmp_path_factory):
    model = make_denoiser()
    history = train_denoiser(model, tmp_path_factory.mktemp("whole"))
    return state_of(model, model.optimizer), history


@pytest.mark.parametrize("stop", range(1, 8))
def test_custom_train_step_resumes(denoiser_run, tmp_path, stop, capsys):
    state, history = denoiser_run
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(make_denoiser(), tmp_path, [StopAfter(stop)])
    resumed = make_denoiser()
    rest = train_denoiser(resumed, tmp_path)
    assert rest["loss"] == history["loss"][stop:]
    assert rest["phase"] == history["phase"][stop:]
    assert_same(state_of(resumed, resumed.optimizer), state)


def test_custom_train_step_switched_on_the_way(denoiser_run):
    _, history = denoiser_run
    assert set(history["phase"]) == {0, 1}
    assert history["loss"][-1] < history["loss"][0]


def test_model_with_its_own_train_step_is_saved_with_its_class(tmp_path):
    model = make_denoiser()
    fit(model, noisy_digits(), 0, 2)
    model.optimizer.advance()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is Denoiser
    assert int(loaded.optimizer.phase) == 1
    losses = fit(model, noisy_digits(), 2, 4)
    assert fit(loaded, noisy_digits(), 2, 4) == losses
    assert_same(state_of(loaded, loaded.optimizer), state_of(model, model.optimizer))
