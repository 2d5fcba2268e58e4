// Rodin inside a program, without a port: the bundled model thinks, then answers.
import { createEngine } from 'rodin';

const engine = await createEngine(); // { model: '/path/to/checkpoint', device: 'cpu', … }
try {
  const messages = [{ role: 'user', content: 'What is 577 × 63?' }];
  let answer = '';
  for await (const { choices } of engine.stream({ messages })) {
    const { reasoning_content: thought, content } = choices[0]?.delta ?? {};
    if (thought) process.stderr.write(thought);
    answer += content ?? '';
  }
  process.stdout.write(`${answer}\n`);
} finally {
  await engine.close();
}
