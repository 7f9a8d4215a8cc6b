// The live loss curve and the last sample of a run, on the nodes that train it.
//
// Nothing of it is stored in the workflow. The server tells a state twice a second while it trains
// ("accvideo.train"), and the stored one when a page is opened (GET /accvideo/run): nodes/live.py.
// Without this file the node's own preview shows the same.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const NODES = new Set(["AccVideoDistill", "AccVideoAdversarialTune"]);
const EVENT = "accvideo.train";
const ROUTE = "/accvideo/run";
const COLOURS = ["#4a9ee0", "#e0605e", "#5bbf6a", "#f0a040"];
const WIDTH = 400;
const HEIGHT = 100;
const MIN_HEIGHT = 240;
const TYPING = 400; // milliseconds after the last key in which a name is not looked up

const panels = new WeakMap(); // node -> Panel
const training = new Set(); // panels that have heard of a run since it was queued
let announced = null; // the client id under which the server knows that this page draws

app.registerExtension({
    name: "accvideo.train",
    setup() {
        api.addEventListener(EVENT, ({ detail }) => heard(detail));
        for (const end of ["execution_success", "execution_error", "execution_interrupted"])
            api.addEventListener(end, ended);
    },
    nodeCreated(node) {
        if (!NODES.has(node.comfyClass)) return;
        const panel = new Panel(node);
        panels.set(node, panel);
        // What a workflow stores is put into the widgets right after this.
        setTimeout(() => panel.load());
    },
});

function heard(state) {
    const node = nodeAt(state.node);
    const panel = node && panels.get(node);
    if (!panel || ![null, state.run].includes(runOf(node))) return;
    training.add(panel);
    panel.show(state);
    if (announced !== api.clientId) panel.load();
}

function ended() {
    for (const panel of training) panel.load();
    training.clear();
}

// The node that an execution id names: "12", or "12:3" for node 3 in the subgraph of node 12.
function nodeAt(id) {
    let node = null;
    let graph = app.rootGraph ?? app.graph;
    for (const part of String(id).split(":")) {
        node = graph?.nodes?.find((each) => String(each.id) === part);
        graph = node?.subgraph;
    }
    return node;
}

// The name in the node's widget; null when it comes over a link.
function runOf(node) {
    if (node.inputs?.some((input) => input.name === "run" && input.link != null)) return null;
    return node.widgets?.find((widget) => widget.name === "run")?.value ?? null;
}

class Panel {
    constructor(node) {
        this.node = node;
        this.state = null;
        this.log = null; // null: where it shows more
        this.build();
        const widget = node.addDOMWidget("accvideo_curve", "accvideo_curve", this.root, {
            serialize: false,
            hideOnZoom: false,
            getMinHeight: () => MIN_HEIGHT,
        });
        widget.serialize = false; // the option is for prompts, this for workflows
        const run = node.widgets.find((each) => each.name === "run");
        const changed = run?.callback;
        if (run)
            run.callback = (...given) => {
                clearTimeout(this.typing);
                this.typing = setTimeout(() => this.load(), TYPING);
                return changed?.apply(run, given);
            };
    }

    build() {
        this.root = element("div", {
            display: "flex", flexDirection: "column", gap: "4px", overflow: "hidden",
            minHeight: `${MIN_HEIGHT}px`, boxSizing: "border-box", padding: "4px 6px",
            font: "11px sans-serif", color: "var(--descrip-text, #999)",
        });
        this.root.className = "accvideo-curve";
        const head = element("div", { display: "flex", gap: "10px", alignItems: "center" });
        this.legend = element("div", { display: "flex", gap: "10px", flex: "1", flexWrap: "wrap" });
        this.scale = element("button", {
            font: "inherit", color: "inherit", cursor: "pointer", padding: "1px 6px",
            background: "transparent", borderRadius: "4px",
            border: "1px solid var(--border-color, #555)",
        });
        this.scale.type = "button";
        this.scale.onclick = () => {
            this.log = !this.isLog();
            this.draw();
        };
        head.append(this.legend, this.scale);
        this.notes = element("div", {
            color: "var(--warning-text, #e0a030)", whiteSpace: "pre-wrap", maxHeight: "4em",
            flex: "none", overflowY: "auto",
        });
        // In a frame of its own, so that no picture's size changes the node's.
        this.frame = element("div", { position: "relative", flex: "1 1 130px", minHeight: "0" });
        this.image = element("img", {
            position: "absolute", width: "100%", height: "100%", objectFit: "contain",
            cursor: "zoom-in",
        });
        this.image.alt = "last sample: teacher and student";
        this.image.onclick = () => window.open(this.image.src, "_blank", "noopener");
        this.frame.append(this.image);
        this.root.append(head, this.axes(), this.notes, this.frame);
        this.draw();
    }

    // The curve's box, with its largest and smallest loss and its last step in the corners.
    axes() {
        const plot = element("div", { position: "relative", flex: "1 1 90px", minHeight: "70px" });
        this.svg = svgElement("svg", {
            viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none",
        });
        Object.assign(this.svg.style, {
            position: "absolute", width: "100%", height: "100%", boxSizing: "border-box",
            border: "1px solid var(--border-color, #555)", borderRadius: "4px",
        });
        const corner = (place) => element("span", { position: "absolute", ...place });
        this.top = corner({ top: "2px", left: "5px" });
        this.bottom = corner({ bottom: "2px", left: "5px" });
        this.right = corner({ bottom: "2px", right: "5px" });
        plot.append(this.svg, this.top, this.bottom, this.right);
        return plot;
    }

    // What the run's folder holds; nothing where there is no run of that name.
    async load() {
        const name = runOf(this.node);
        if (!name) return;
        const client = api.clientId ?? "";
        const query = new URLSearchParams({ name, client });
        const answer = await api.fetchApi(`${ROUTE}?${query}`);
        const state = answer.ok ? await answer.json() : null;
        announced = client || announced;
        if (runOf(this.node) !== name) return;
        // What was heard meanwhile is newer, unless the run has begun anew.
        if (state && training.has(this) && state.step < (this.state?.step ?? 0)) return;
        this.show(state);
    }

    show(state) {
        this.state = state;
        this.draw();
    }

    isLog() {
        const values = Object.values(this.state?.lines ?? {}).flatMap((line) => line.map((p) => p[1]));
        const low = Math.min(...values);
        return low > 0 && (this.log ?? Math.max(...values) > 2 * low);
    }

    draw() {
        const lines = Object.entries(this.state?.lines ?? {});
        const log = this.isLog();
        this.scale.textContent = log ? "log" : "linear";
        this.scale.style.visibility = lines.length ? "visible" : "hidden";
        this.svg.style.visibility = lines.length ? "visible" : "hidden";
        this.svg.replaceChildren();
        this.legend.replaceChildren();
        this.top.textContent = this.bottom.textContent = this.right.textContent = "";
        if (lines.length) this.plot(lines, log ? Math.log : (value) => value);
        else this.legend.append("The loss curve of this run will stand here.");
        this.notes.textContent = (this.state?.notes ?? []).join("\n");
        this.picture(this.state?.sample);
    }

    plot(lines, scale) {
        const all = lines.flatMap(([, line]) => line);
        const steps = all.map((point) => point[0]);
        const values = all.map((point) => point[1]);
        const [first, last] = [Math.min(...steps), Math.max(...steps)];
        const [low, high] = [Math.min(...values), Math.max(...values)];
        const part = (value, from, to) => (to > from ? (value - from) / (to - from) : 0.5);
        const at = ([step, value]) => {
            const up = part(scale(value), scale(low), scale(high));
            return `${(WIDTH * part(step, first, last)).toFixed(1)},` +
                `${(HEIGHT * (0.95 - 0.9 * up)).toFixed(1)}`;
        };
        lines.forEach(([name, line], i) => {
            const colour = COLOURS[i % COLOURS.length];
            const smooth = smoothed(line);
            for (const [points, opacity] of [[line, 0.35], [smooth, 1]])
                this.svg.append(svgElement("polyline", {
                    points: points.map(at).join(" "), fill: "none", stroke: colour,
                    "stroke-opacity": opacity, "stroke-width": 1.5,
                    "vector-effect": "non-scaling-stroke",
                }));
            const label = element("span", { color: colour });
            label.textContent = `${name} ${smooth.at(-1)[1].toPrecision(3)}`;
            this.legend.append(label);
        });
        this.top.textContent = high.toPrecision(3);
        this.bottom.textContent = low.toPrecision(3);
        const { step, total } = this.state;
        this.right.textContent = total ? `${step} / ${total}` : `${step}`;
    }

    picture(sample) {
        this.frame.style.display = sample ? "" : "none";
        if (!sample) return;
        const url = api.apiURL(`/view?${new URLSearchParams(sample)}`);
        if (this.image.getAttribute("src") !== url) this.image.src = url;
    }
}

// The running mean over a centred window of a twentieth of the line, and of 11 points at least:
// losses rise and fall with the key interval whose turn it is.
function smoothed(line) {
    const reach = Math.max(5, Math.floor(line.length / 40));
    return line.map(([step], i) => {
        const near = line.slice(Math.max(0, i - reach), i + reach + 1);
        return [step, near.reduce((sum, point) => sum + point[1], 0) / near.length];
    });
}

function element(tag, style) {
    const made = document.createElement(tag);
    Object.assign(made.style, style);
    return made;
}

function svgElement(tag, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
}
