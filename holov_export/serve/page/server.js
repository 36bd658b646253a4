/* What this page says to its server, and what comes back. Nothing here touches the document. */

export class Problem extends Error {
  /* `message` is for people; `status` is that of HTTP, or 0. */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/* The entry of the one model in /v1/models. */
export async function modelFromServer(key) {
  const list = await (await responseFrom("/v1/models", key)).json();
  return list.data[0];
}

/* The events of an answer, each an object; ends with the server's [DONE].
   `budget`: tokens of each picture; undefined leaves it to the server. */
export async function* answerEvents({ model, turns, budget, key, signal }) {
  const body = JSON.stringify({ model, messages: messagesFromTurns(turns), stream: true, kept: true, budget });
  const response = await responseFrom("/v1/chat/completions", key, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true }; // the connection was cut
    });
    if (done) throw new Problem("The answer broke off.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Problem(chunk.error.message);
      yield chunk;
    }
  }
}

/* The conversation; of the last turn only the question. */
function messagesFromTurns(turns) {
  return turns.flatMap(({ question, pictures, answer }, index) => {
    const images = pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    const asked = { role: "user", content: [...images, { type: "text", text: question }] };
    return index === turns.length - 1 ? [asked] : [asked, { role: "assistant", content: answer }];
  });
}

async function responseFrom(path, key, options = {}) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached, or it cut the connection.");
  }
  if (!response.ok) throw await problemFromResponse(response, key);
  return response;
}

async function problemFromResponse(response, key) {
  const { status } = response;
  const said = await response.json().then((body) => body.error?.message, () => null);
  const wait = response.headers.get("retry-after");
  const again = wait ? ` Try again in ${wait} s.` : "";
  const refused = key ? "The server refuses this API key." : "This server needs an API key.";
  if (status === 401) return new Problem(refused, status);
  if (status === 413) return new Problem(`Too large for this server: ${said ?? "too many bytes."}`, status);
  if (status === 429) return new Problem(`The server is busy: ${said ?? "too many requests."}${again}`, status);
  return new Problem(`${said ?? `The server answered with status ${status}.`}${again}`, status);
}
