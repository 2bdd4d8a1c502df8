"""llama.cpp, by the wheel xllamacpp, as the tests ask it."""

import json
import urllib.request
from pathlib import Path


class LlamaServer:
    """A loaded GGUF file on one thread."""

    def __init__(self, path: Path, context: int = 128) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.verbosity, params.warmup, params.fit_params = 0, False, False
        self.server = xllamacpp.Server(params)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of ``text`` as llama.cpp would serve it, bos and eos included where the file asks for them."""
        return self._post("tokenize", {"content": text, "add_special": True, "parse_special": special})["tokens"]

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], dict[int, float]]:
        """``count`` greedy tokens after ``ids``; and by position the log-probability of those that end a whole
        character, for llama.cpp tells only these. An end token does not end it."""
        asked = {"prompt": ids, "n_predict": count, "temperature": 0, "n_probs": 1, "ignore_eos": True}
        answer = self._post("completion", {**asked, "return_tokens": True, "cache_prompt": False})
        found, place = {}, 0
        for one in answer.get("completion_probabilities", []):
            place = answer["tokens"].index(one["id"], place)
            found[place] = one["logprob"]
            place += 1
        return answer["tokens"], found

    def _post(self, place: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{place}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
