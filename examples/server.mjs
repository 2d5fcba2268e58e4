// Rodin's server inside a program, with a route of one's own beside its API.
import { createServer } from 'rodin';

const server = await createServer({ port: 0, cacheMemory: '256MiB', servedModelName: ['pocket'] });
server.app.get('/hello', async () => ({ hello: 'world' }));
const url = await server.listen();
await server.ready();
try {
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({
      model: 'pocket',
      messages: [{ role: 'user', content: 'What is 577 × 63?' }],
      thinking: { type: 'enabled' },
    }),
  });
  const { choices } = await response.json();
  const { hello } = await (await fetch(`${url}/hello`)).json();
  process.stdout.write(`${hello}: ${choices[0].message.content}\n`);
} finally {
  await server.close();
}
