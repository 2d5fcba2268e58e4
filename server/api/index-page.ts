/** The page at /: what this is and how to try it. */
export function indexPage(modelName: string, origin: string): string {
  const name = escapeHtml(modelName);
  const body = escapeHtml(
    JSON.stringify({ model: modelName, messages: [{ role: 'user', content: 'What is 577 × 63?' }] }),
  );
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Rodin</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem}pre{background:#f4f4f4;padding:1rem;overflow-x:auto}</style>
<h1>Rodin</h1>
<p>This server runs the reasoning model <b>${name}</b> behind an OpenAI-compatible API. Point any OpenAI client at
<code>${escapeHtml(origin)}/v1</code>, or try:</p>
<pre>curl ${escapeHtml(origin)}/v1/chat/completions -H 'content-type: application/json' \\
  -d '${body}'</pre>
<p><a href="openapi.json">API document</a> · <a href="v1/models">models</a> · <a href="health">health</a> ·
<a href="metrics">metrics</a></p>
</html>
`;
}

function escapeHtml(text: string): string {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}
