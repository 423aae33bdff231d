// Reads openapi.json and builds the page from it. Text reaches the page as text only, never as markup.
"use strict";

/** An element with attributes and children. */
function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const base = new URL(".", location.href);
let api = { paths: {}, components: { schemas: {} } };

/** The schema behind a reference. */
function resolve(schema) {
  const name = schema && schema.$ref && schema.$ref.split("/").pop();
  return name ? api.components.schemas[name] : schema || {};
}

function typeText(schema) {
  const found = resolve(schema);
  const types = [].concat(found.type || "any").filter((type) => type !== "null");
  let text = types.join(" or ");
  if (found.items) text += ` of ${typeText(found.items)}`;
  if (found.minimum !== undefined || found.maximum !== undefined) text += ` ${found.minimum ?? ""}…${found.maximum ?? ""}`;
  return text;
}

function noteText(schema) {
  const parts = [];
  if (schema.description) parts.push(schema.description);
  if (schema.enum) parts.push(schema.enum.filter((value) => value !== null).join(", "));
  if (schema.examples) parts.push(schema.examples.join(", "));
  return parts.join("; ");
}

function fieldTable(schema) {
  const found = resolve(schema);
  const required = new Set(found.required || []);
  const rows = Object.entries(found.properties || {}).map(([name, field]) =>
    make("tr", {},
      make("td", {}, make("code", {}, name), required.has(name) ? " *" : ""),
      make("td", {}, typeText(field)),
      make("td", {}, field.default === undefined ? "" : make("code", {}, JSON.stringify(field.default))),
      make("td", { class: "quiet" }, noteText(field))));
  if (rows.length === 0) return make("p", { class: "quiet" }, typeText(found));
  const head = make("tr", {}, ...["field", "type", "default", ""].map((text) => make("th", { scope: "col" }, text)));
  return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

/** A body to begin with: what is required, and what most requests say. */
function sample(schema) {
  const usual = { prompt: "a red apple", steps: 20, width: 512, height: 512, seed: -1 };
  const found = resolve(schema);
  const body = {};
  for (const [name, field] of Object.entries(found.properties || {})) {
    if (name in usual) body[name] = field.maximum !== undefined ? Math.min(usual[name], field.maximum) : usual[name];
    else if ((found.required || []).includes(name)) body[name] = name === "request" ? { prompt: "a red apple" } : field.type === "array" ? [] : "";
  }
  return JSON.stringify(body, null, 2);
}

function pictures(value, out) {
  if (Array.isArray(value)) value.forEach((item) => pictures(item, out));
  else if (typeof value === "string" && /^(iVBOR|\/9j\/|UklGR)/.test(value)) out.push(value);
  else if (value && typeof value === "object") Object.values(value).forEach((item) => pictures(item, out));
  return out;
}

function shorten(_, value) {
  return typeof value === "string" && value.length > 400 ? `${value.slice(0, 80)}… (${value.length} characters)` : value;
}

async function show(response, output) {
  const type = response.headers.get("content-type") || "";
  output.replaceChildren(make("p", {}, `${response.status} ${response.statusText}, ${response.headers.get("x-process-time") || "?"} s, ${type}`));
  if (type.startsWith("image/")) {
    const reader = new FileReader();
    reader.onload = () => output.append(make("img", { src: reader.result, alt: "the answer" }));
    reader.readAsDataURL(await response.blob());
    return;
  }
  const text = await response.text();
  let shown = text;
  try {
    const value = JSON.parse(text);
    shown = JSON.stringify(value, shorten, 2);
    for (const picture of pictures(value, [])) {
      const mime = { i: "png", "/": "jpeg", U: "webp" }[picture[0]];
      output.append(make("img", { src: `data:image/${mime};base64,${picture}`, alt: "a picture of the answer" }));
    }
  } catch { /* Not JSON: shown as it is. */ }
  output.append(make("pre", { tabindex: "0" }, shown));
}

function tryForm(path, method, operation) {
  const inputs = (operation.parameters || []).map((parameter) => {
    const input = make("input", { type: "text" });
    return { parameter, input, label: make("label", {}, `${parameter.name} (${parameter.in})`, input) };
  });
  const content = operation.requestBody && operation.requestBody.content;
  const isForm = content && content["multipart/form-data"];
  const files = isForm ? ["image", "mask"].filter((name) => name in resolve(isForm.schema).properties).map((name) => {
    const input = make("input", { type: "file", accept: "image/*" });
    return { name, input, label: make("label", {}, name, input) };
  }) : [];
  const body = content && make("textarea", { "aria-label": "body", spellcheck: "false" });
  if (body) body.value = sample(Object.values(content)[0].schema).replace(/^ {2}"image": "",?\n/m, isForm ? "" : "$&");
  const output = make("output", {});
  const button = make("button", { type: "button" }, "Send");
  button.addEventListener("click", async () => {
    button.disabled = true;
    output.replaceChildren("Sent; waiting.");
    try {
      let filled = path.slice(1);
      const query = new URLSearchParams();
      for (const { parameter, input } of inputs) {
        if (parameter.in === "path") filled = filled.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
        else if (input.value) query.set(parameter.name, input.value);
      }
      const url = new URL(filled, base);
      url.search = query.toString();
      const options = { method: method.toUpperCase(), headers: {} };
      const token = document.getElementById("token").value;
      if (token) options.headers.authorization = `Bearer ${token}`;
      if (isForm) {
        options.body = new FormData();
        for (const [name, value] of Object.entries(JSON.parse(body.value || "{}"))) options.body.append(name, value);
        for (const { name, input } of files) if (input.files[0]) options.body.append(name, input.files[0]);
      } else if (body) {
        options.body = body.value;
        options.headers["content-type"] = "application/json";
      }
      await show(await fetch(url, options), output);
    } catch (error) {
      output.replaceChildren(`Not sent: ${error.message}`);
    }
    button.disabled = false;
  });
  const row = make("div", { class: "row" }, ...inputs.map((one) => one.label), ...files.map((one) => one.label), button);
  return make("div", {}, ...(body ? [body] : []), row, output);
}

function fill(path, method, operation) {
  const inside = make("div", { class: "inside" });
  const content = operation.requestBody && operation.requestBody.content;
  if (content) inside.append(make("h3", {}, "Body"), fieldTable(Object.values(content)[0].schema));
  const notes = (operation.parameters || []).filter((parameter) => parameter.description);
  for (const parameter of notes) inside.append(make("p", {}, make("code", {}, parameter.name), `: ${parameter.description}`));
  const answer = Object.values((operation.responses["200"] || {}).content || {})[0];
  if (answer && answer.schema) inside.append(make("h3", {}, "Answer"), fieldTable(answer.schema));
  if (path.endsWith("/events")) {
    inside.append(make("p", {}, `Server-sent events; try: curl -N '${new URL(path.slice(1), base)}'`));
  } else {
    inside.append(make("h3", {}, "Try"), tryForm(path, method, operation));
  }
  return inside;
}

function entry(path, method, operation) {
  const summary = make("summary", {},
    make("span", { class: `method ${method}` }, method),
    make("span", { class: "path" }, path),
    make("span", { class: "quiet" }, operation.summary || ""));
  const details = make("details", { "data-words": `${method} ${path} ${operation.summary}`.toLowerCase() }, summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(fill(path, method, operation));
  });
  return details;
}

function build() {
  document.getElementById("version").textContent = api.info.version;
  document.getElementById("description").textContent = api.info.description;
  const groups = new Map();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = (operation.tags || ["other"])[0];
      if (!groups.has(tag)) groups.set(tag, make("section", {}, make("h2", {}, tag)));
      groups.get(tag).append(entry(path, method, operation));
    }
  }
  document.getElementById("routes").replaceChildren(...groups.values());
}

document.getElementById("search").addEventListener("input", (event) => {
  const wanted = event.target.value.trim().toLowerCase();
  for (const details of document.querySelectorAll("details")) details.hidden = !details.dataset.words.includes(wanted);
  for (const section of document.querySelectorAll("section")) section.hidden = !section.querySelector("details:not([hidden])");
});

fetch(new URL("openapi.json", base))
  .then((response) => (response.ok ? response.json() : Promise.reject(new Error(`${response.status}`))))
  .then((document) => { api = document; build(); })
  .catch((error) => document.getElementById("routes").replaceChildren(make("p", {}, `openapi.json was not read: ${error.message}`)));
