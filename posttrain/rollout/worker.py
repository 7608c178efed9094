"""Our methods on every vLLM worker: take in weights, read them back, show hidden states, record routing.

vLLM mixes `PolicyWorker` into its worker class (`worker_extension_cls`) and calls the methods by name
through `collective_rpc`, in this process or in a server's.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.rollout.readback import checksum, held
from posttrain.rollout.routing import RoutingRecorder

EXTENSION = "posttrain.rollout.worker.PolicyWorker"


class PolicyWorker:
    """Mixed into vLLM's worker; `model_runner` and `vllm_config` are the worker's own."""

    model_runner: Any
    vllm_config: Any

    def policy_models(self) -> tuple[nn.Module, nn.Module | None]:
        """Return the model and its drafter (None without drafting)."""
        return self.model_runner.get_model(), self.model_runner.get_draft_model()

    def policy_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and type of every tensor that the engine holds, by checkpoint name."""
        return {name: (tuple(t.shape), t.dtype) for name, t in held(*self.policy_models())}

    def policy_load_begin(self) -> None:
        """Prepare every module for new weights; its kernels and addresses stay."""
        from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

        for model, _ in self._loaded_models():
            initialize_layerwise_reload(model)

    def policy_load(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Load some tensors, by checkpoint name; each goes to the model or to the drafter."""
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        with disable_mtp_completeness_check():  # the modules may come one by one
            for model, _ in self._loaded_models():
                model.load_weights(tensors)

    def policy_load_end(self) -> None:
        """Finish the modules that wait for others (attention) and forget what was cached."""
        from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

        for model, config in self._loaded_models():
            finalize_layerwise_reload(model, config)

    def policy_checksums(self) -> list[tuple[str, int]]:
        """Return (checkpoint name, checksum) of every copy in the engine's memory."""
        names, sums = [], []
        for name, tensor in held(*self.policy_models()):
            names.append(name)
            sums.append(checksum(tensor))
        return list(zip(names, torch.stack(sums).tolist(), strict=True))

    def policy_record_routing(self) -> None:
        """Start to record the expert choices of all requests; CPU only, vLLM does it itself on CUDA."""
        self._policy_routing = RoutingRecorder(self.model_runner)

    def policy_take_routing(self, lengths: dict[str, int]) -> dict[str, Tensor]:
        """Return the records of these requests (name -> tokens), and forget what was recorded."""
        return self._policy_routing.take(lengths)

    def policy_capture_begin(self) -> None:
        """Start to record what each layer of the model gives, for the positions of one request."""
        inner = self.model_runner.get_model().model
        self._policy_states: dict[str, dict[int, Tensor]] = {}
        self._policy_hooks = []
        for index, layer in enumerate(inner.layers):
            name = f"layers.{index}"
            hook = layer.register_forward_hook(self._recorder(name))
            self._policy_hooks.append(hook)
        self._policy_hooks.append(
            inner.layers[0].register_forward_pre_hook(self._embedding_recorder())
        )

    def policy_capture_end(self) -> dict[str, dict[int, Tensor]]:
        """Stop recording; return layer -> position -> hidden state [width]."""
        for hook in self._policy_hooks:
            hook.remove()
        states = self._policy_states
        del self._policy_hooks, self._policy_states
        return states

    def _loaded_models(self) -> Iterator[tuple[Any, Any]]:
        model, draft = self.policy_models()
        yield model, self.vllm_config.model_config
        if draft is not None:
            yield draft, self.vllm_config.speculative_config.draft_model_config

    def _keep(self, name: str, positions: Tensor, states: Tensor) -> None:
        rows = self._policy_states.setdefault(name, {})
        # A rejected draft is overwritten when its position is computed again.
        rows.update(zip(positions.tolist(), states.detach().float().cpu(), strict=True))

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            hidden, residual = output
            self._keep(name, args[0], hidden + residual)

        return record

    def _embedding_recorder(self) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._keep("embed_tokens", args[0], args[1].clone())

        return record
