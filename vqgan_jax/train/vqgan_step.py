"""Stage 1: the GAN step (arXiv 2012.09841, equations 5 to 7) as pure functions of (state, batch, frozen).

One forward pass of the generator under `jax.vjp`; the cotangents of the reconstruction loss and of the adversarial loss
are taken at the picture, pulled through the last layer alone for the adaptive weight, mixed, and pulled back once.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from vqgan_jax import losses
from vqgan_jax.models.autoencoder import last_layer
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.quantizers import VQConfig, apply_restart, perplexity
from vqgan_jax.models.resnet import logits_distance
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig, model_input
from vqgan_jax.train.adversary import Adversary, init_discriminator
from vqgan_jax.train.objective import VQGANObjective
from vqgan_jax.train.partial import fixed_codes, keep_frozen, stop_frozen
from vqgan_jax.train.state import Metrics, TrainState, Tree, accumulate, guard, update_ema


def make_init(
    model: VQGAN, tx: Mapping[str, optax.GradientTransformation], ema: bool
) -> Callable[[jax.Array], TrainState]:
    """Returns `init(key) -> TrainState`, to be run by `parallel.init_sharded`.

    Args:
      model: the generator.
      tx: the optimizer of each network.
      ema: whether the state holds averaged parameters.
    """
    c = model.config

    def init(key: jax.Array) -> TrainState:
        key_g, key_d, root = jax.random.split(key, 3)
        size = c.autoencoder.resolution
        images = jnp.zeros((1, size, size, c.autoencoder.in_channels))
        variables = model.init({"params": key_g, "quantizer": key_g}, images)
        params = {"generator": variables.pop("params")}
        collections = {"generator": variables}
        if c.discriminator:
            variables = init_discriminator(c.discriminator, key_d, size, c.autoencoder.out_channels)
            params["discriminator"] = variables.pop("params")
            collections["discriminator"] = variables
        opt_state = {name: tx[name].init(params[name]) for name in params}
        return TrainState.create(
            root, params, collections, opt_state, {"generator": params["generator"]} if ema else {}
        )

    return init


def make_step(
    model: VQGAN,
    objective: VQGANObjective,
    lpips: LPIPS,
    tx: Mapping[str, optax.GradientTransformation],
    *,
    ema_decay: float,
    accumulation: int = 1,
    train_only: Sequence[str] = (),
) -> Callable[[TrainState, Mapping[str, jax.Array], Tree], tuple[TrainState, Metrics]]:
    """Returns the train step `(state, batch, frozen) -> (state, metrics)`; `frozen["lpips"]` holds LPIPS's variables,
    `frozen["resnet50"]` the classifier's; `train_only` is as in train/partial.py.

    Metrics: every loss, `adaptive_weight`, `adversarial_factor`, the discriminator's mean logits and its accuracy (the
    mean of the shares of real and of fake ones that it tells), `codebook_usage` (share of the codes that this batch
    uses), `codebook_perplexity`, gradient norms, `skipped`.
    """
    o, c = objective, model.config
    adversary = Adversary(c.discriminator, o, model.dtype, accumulation) if c.discriminator else None

    def generate(params: Tree, collections: Tree, images: jax.Array, step: jax.Array, rngs: dict[str, jax.Array]):
        variables = {"params": stop_frozen(params, train_only)["generator"], **collections["generator"]}
        options = dict(train=True, step=step, perturbation=o.perturbation, fixed_codes=fixed_codes(train_only))
        return model.apply(variables, images, **options, rngs=rngs, mutable=["codebook"])

    def reconstruction_loss(reconstruction: jax.Array, images: jax.Array, frozen: Tree) -> tuple[jax.Array, Metrics]:
        if o.reconstruction == "bce":
            loss = losses.binary_cross_entropy(reconstruction, images)
            return loss, {"bce": loss}
        metrics = {"l1": jnp.mean(jnp.abs(reconstruction - images))}
        loss = o.pixel_weight * metrics["l1"]
        if o.reconstruction == "l2":
            metrics["l2"] = jnp.mean((reconstruction - images) ** 2)
            loss = o.pixel_weight * metrics["l2"]
        if o.perceptual_weight:
            metrics["lpips"] = lpips.apply(frozen["lpips"], reconstruction, images).mean()
            loss = loss + o.perceptual_weight * metrics["lpips"]
        if o.logits_weight:
            metrics["logits_distance"] = logits_distance(frozen["resnet50"], reconstruction, images)
            loss = loss + o.logits_weight * metrics["logits_distance"]
        return loss, metrics

    def generator_pass(params, collections, images, step, rngs, frozen):
        """Gradients of the generator's loss, its reconstruction, updated collections, metrics, restarted codes."""

        def forward(generator):
            output, updated = generate(params | {"generator": generator}, collections, images, step, rngs)
            return (output.reconstruction, output.aux.loss), (output, updated)

        (fake, quantizer_loss), pull, (output, updated) = jax.vjp(forward, params["generator"], has_aux=True)
        collections = collections | {"generator": updated}
        grad = jax.value_and_grad(reconstruction_loss, has_aux=True)
        (nll, metrics), cotangent = grad(fake, images, frozen)
        loss = nll + o.quantizer_weight * quantizer_loss
        if adversary:

            def adversarial(fake):
                logits, updated = adversary.logits(params, collections, fake, frozen, rngs["augment"])
                return losses.generator_loss(logits), updated

            (g_loss, collections), adversarial_cotangent = jax.value_and_grad(adversarial, has_aux=True)(fake)
            factor, weight = o.adversarial_factor(step), jnp.ones(())
            if o.adaptive:
                kernel = params["generator"]["decoder"]["conv_out"]["kernel"]
                _, pull_last = jax.vjp(lambda k: last_layer(c.autoencoder, k, output.features), kernel)
                norms = (optax.tree.norm(pull_last(g)) for g in (cotangent, adversarial_cotangent))
                weight = losses.adaptive_weight(*norms, o.adaptive_epsilon, o.adaptive_maximum)
            weight = jax.lax.stop_gradient(weight * o.adversarial_weight)
            cotangent = cotangent + weight * factor * adversarial_cotangent
            loss = loss + weight * factor * g_loss
            metrics |= {"generator_loss": g_loss, "adaptive_weight": weight, "adversarial_factor": factor}
        (grads,) = pull((cotangent, jnp.full_like(quantizer_loss, o.quantizer_weight)))
        metrics |= {"loss": loss, "nll": nll, "quantizer_loss": quantizer_loss}
        metrics |= {f"quantizer/{name}": value for name, value in output.aux.metrics.items()}
        return grads, fake, collections, metrics | {"counts": output.aux.counts}, output.aux.restart

    def discriminator_pass(params, collections, images, fake, step, rngs, frozen):
        def loss_of(weights):
            new = stop_frozen(params | {"discriminator": weights}, train_only)
            return adversary.loss(new, collections, images, fake, step, frozen, rngs["augment"])

        (_, (collections, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(params["discriminator"])
        return grads, collections, metrics

    def streams(state: TrainState, prefix: str, index: jax.Array) -> dict[str, jax.Array]:
        names = ("quantizer", "dropout", "augment")
        return {name: jax.random.fold_in(state.stream(prefix + name), index) for name in names}

    def update(
        name: str, params: Tree, opt_state: Tree, grads: Tree, step: jax.Array, allowed: jax.Array | bool = True
    ):
        optimizer = optax.with_extra_args_support(tx[name])
        updates, new_opt = optimizer.update(grads, opt_state[name], params[name], step=step)
        new = (optax.apply_updates(params[name], updates), new_opt)
        if allowed is not True:
            new = jax.tree.map(lambda a, b: jnp.where(allowed, a, b), new, (params[name], opt_state[name]))
        return params | {name: new[0]}, opt_state | {name: new[1]}, {f"grad_norm/{name}": optax.tree.norm(grads)}

    def step(state: TrainState, batch: Mapping[str, jax.Array], frozen: Tree) -> tuple[TrainState, Metrics]:
        params, opt_state = state.params, state.opt_state
        simultaneous = adversary and o.schedule == "simultaneous"

        def generator_micro(carry, batch, index):
            collections, restart = carry
            images, rngs = model_input(c, batch), streams(state, "", index)
            grads, fake, collections, metrics, new = generator_pass(
                params, collections, images, state.step, rngs, frozen
            )
            restart = _merge_restarts(restart, new)
            all_grads = {"generator": grads}
            if simultaneous:
                fake = jax.lax.stop_gradient(fake)
                all_grads["discriminator"], collections, more = discriminator_pass(
                    params, collections, images, fake, state.step, rngs, frozen
                )
                metrics |= more
            return (collections, restart), (all_grads, metrics)

        def discriminator_micro(collections, batch, index):
            images, rngs = model_input(c, batch), streams(state, "second_", index)
            output, _ = generate(params, collections, images, state.step, rngs)
            fake = jax.lax.stop_gradient(output.reconstruction)
            grads, collections, metrics = discriminator_pass(
                params, collections, images, fake, state.step, rngs, frozen
            )
            return collections, (grads, metrics)

        carry = (state.collections, _no_restart(c))
        (collections, restart), (grads, metrics) = accumulate(generator_micro, carry, batch, accumulation)
        counts = metrics.pop("counts") * accumulation  # of all micro-batches: a mean of their usages would be smaller
        metrics |= {"codebook_usage": jnp.mean(counts > 0), "codebook_perplexity": perplexity(counts)}
        params, opt_state, norms = update("generator", params, opt_state, grads["generator"], state.step)
        metrics |= norms
        if restart is not None:
            params = params | {"generator": _restarted(params["generator"], restart)}
        if adversary:
            if not simultaneous:
                collections, (grads["discriminator"], more) = accumulate(
                    discriminator_micro, collections, batch, accumulation
                )
                metrics |= more
            allowed = True if o.idle_discriminator_updates else o.discriminator_factor(state.step) > 0
            params, opt_state, norms = update(
                "discriminator", params, opt_state, grads["discriminator"], state.step, allowed
            )
            metrics |= norms
        ema = state.ema
        if ema_decay:
            ema = update_ema(ema, {"generator": params["generator"]}, ema_decay, state.step)
            if restart is not None:
                ema = {"generator": _restarted(ema["generator"], restart)}
        new = state.replace(params=params, collections=collections, opt_state=opt_state, ema=ema)
        return guard(state, keep_frozen(state, new, train_only), metrics)

    return step


def _no_restart(config: VQGANConfig) -> tuple[jax.Array, jax.Array] | None:
    if not isinstance(config.quantizer, VQConfig) or not config.quantizer.restart_below:
        return None
    q, e = config.quantizer.codebook_size, config.quantizer.dim
    return jnp.zeros(q, bool), jnp.zeros((q, e))


def _restarted(generator: Tree, restart: tuple[jax.Array, jax.Array]) -> Tree:
    return generator | {"quantizer": apply_restart(generator["quantizer"], restart)}


def _merge_restarts(old, new):
    if new is None:
        return old
    return old[0] | new[0], jnp.where(new[0][:, None], new[1], old[1])
