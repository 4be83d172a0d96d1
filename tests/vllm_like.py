"A server that answers as vLLM does, with a model's real numbers, and with faults where a test asks for them."
import asyncio, json, threading

import torch, uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from waiting import until

class VllmLike:
    def __init__(self, live, name="big", key=None, context=64, forms=("echo", "prompt_logprobs"), port=0):
        self.live, self.name, self.key, self.context, self.forms = live, name, key, context, forms
        self.asked, self.faults, self.always, self.lock = [], [], None, threading.Lock()
        config = uvicorn.Config(self.app(), port=port, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)

    def __enter__(self):
        threading.Thread(target=self.server.run, daemon=True).start()
        until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self
    def __exit__(self, *_):
        self.server.force_exit = self.server.should_exit = True
        until(lambda: not self.server.servers or not any(s.is_serving() for s in self.server.servers))

    def entry(self, **more): return dict(name="far", endpoint=self.url, model=self.name, parameters=1e6, together=4, tries=3) | more

    def app(self):
        app = FastAPI()
        @app.get("/v1/models")
        async def models(request: Request):
            if refused := self.refused(request): return refused
            return dict(object="list", data=[dict(id=self.name, root=self.name, max_model_len=self.context)])
        @app.post("/v1/completions")
        async def completions(request: Request): return await self.respond(request, self.completion)
        @app.post("/v1/chat/completions")
        async def chat(request: Request): return await self.respond(request, self.chat)
        return app

    def refused(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse(dict(error=dict(message=f"wrong key, expected {self.key}")), 401)

    async def respond(self, request, answer):
        body = await request.json()
        if refused := self.refused(request): return refused
        self.asked.append(body)
        fault = self.faults.pop(0) if self.faults else self.always
        if fault == 429: return JSONResponse(dict(error=dict(message="too many")), 429, headers={"retry-after": "0"})
        if isinstance(fault, int): return JSONResponse(dict(error=dict(message=f"broken, by the way your key is {self.key}")), fault)
        if fault == "silence": await asyncio.sleep(3)
        if fault == "garbage": return Response("<html>gateway</html>")
        try: said = await asyncio.to_thread(answer, body)
        except ValueError as e: return JSONResponse(dict(object="error", message=str(e), type="BadRequestError", code=400), 400)
        if fault == "none": said["choices"] = []
        if fault == "twice": said["choices"] *= 2
        if fault == "truncated":
            for k, v in (said["choices"][0].get("logprobs") or {}).items(): said["choices"][0]["logprobs"][k] = v[:len(v) // 2]
            for k in ("prompt_logprobs", "text"): said["choices"][0][k] = None
        if fault == "hangs up":
            whole = json.dumps(said).encode()
            async def half():
                yield whole[:len(whole) // 2]
                raise RuntimeError("the line is cut")
            return StreamingResponse(half(), headers={"content-length": str(len(whole))}, media_type="application/json")
        return said

    def completion(self, body):
        prompt, n = body["prompt"], body["max_tokens"]
        if body.get("temperature") != 0: raise ValueError("only greedily")
        for form in ("echo", "prompt_logprobs"):
            if form in body and form not in self.forms: raise ValueError(f"{form} is not supported")
        ids = prompt if isinstance(prompt, list) else self.live.encode([prompt])[0]
        if len(ids) + n > self.context:
            raise ValueError(f"This model's maximum context length is {self.context} tokens. Your request has {len(ids)} input tokens.")
        with self.lock: # as a batch of its own
            [text] = self.live.continue_batch([ids], n, body.get("stop", []))
            with torch.inference_mode(): logp = self.live.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        choice = dict(index=0, text=text, finish_reason="length", logprobs=None)
        if body.get("echo"): choice |= dict(text=self.live.tokenizer.decode(ids) + text, logprobs=self.echoed(ids, logp, body["logprobs"]))
        if "prompt_logprobs" in body:
            def row(t, p): return {str(t): dict(logprob=float(p[t]), rank=1 + int((p > p[t]).sum()), decoded_token=self.word(t))}
            choice["prompt_logprobs"] = [None, *(row(t, p) for t, p in zip(ids[1:], logp))]
        return dict(id="cmpl-1", object="text_completion", model=self.name, choices=[choice],
                    usage=dict(prompt_tokens=len(ids), completion_tokens=n, total_tokens=len(ids) + n))

    def word(self, t): return self.live.tokenizer.convert_ids_to_tokens(int(t))
    def echoed(self, ids, logp, k):
        "Offsets count the written forms of tokens, so that they drift where these are longer than their texts; texts of tokens may be alike."
        new = int(logp[-1].argmax())
        words, values, tops, offsets = [], [None], [None], [0]
        for t in (*ids, new): words.append(self.word(t))
        for t, p in zip([*ids[1:], new], logp):
            values.append(float(p[t]))
            tops.append({self.word(t): float(p[t])} | {self.word(j) + " ": float(p[j]) for j in p.topk(k).indices if j != t})
        for w in words[:-1]: offsets.append(offsets[-1] + len(w))
        return dict(tokens=words, token_logprobs=values, top_logprobs=tops, text_offset=offsets)

    def chat(self, body):
        self.live.tokenizer.chat_template = self.live.tokenizer.chat_template or "{{ bos_token }}{{ messages[-1].content }}"
        text = self.live.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = self.live.tokenizer(text, add_special_tokens=False)["input_ids"]
        with self.lock: [said] = self.live.continue_batch([ids], body["max_tokens"], body.get("stop", []))
        return dict(choices=[dict(index=0, message=dict(role="assistant", content=said))], usage=dict(prompt_tokens=len(ids)))
