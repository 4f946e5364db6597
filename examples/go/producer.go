// A producer in Go: one request adds a job, one subscription follows it.
//
// Written from docs/protocol.md. Needs a queue: a worker of it must have run once.
//
//	go mod tidy && go build producer.go
//	./producer examples tasks.count_words '["three words, no"]'
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"
)

const patience = 3 * time.Second

// A Job as it is stored. Fields that are left out have the defaults of the protocol.
type Job struct {
	Version    int             `json:"v"`
	ID         string          `json:"id"`
	Task       string          `json:"task"`
	Args       json.RawMessage `json:"args"`
	MaxRetries int             `json:"max_retries"`
	Backoff    float64         `json:"backoff"`
	CreatedAt  float64         `json:"created_at"`
}

// An Outcome is what the events completed, failed, expired and cancelled carry.
type Outcome struct {
	Result    json.RawMessage `json:"result"`
	LastError string          `json:"last_error"`
}

// A PubAck is the answer of the server: `Error` is set if it stored nothing.
type PubAck struct {
	Error *struct {
		Description string `json:"description"`
	} `json:"error"`
}

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: producer QUEUE TASK ARGS, ARGS a JSON array")
		os.Exit(2)
	}
	completed, err := run(os.Args[1], os.Args[2], os.Args[3])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if !completed {
		os.Exit(1)
	}
}

func run(queue, task, args string) (bool, error) {
	if list := []any{}; json.Unmarshal([]byte(args), &list) != nil {
		return false, fmt.Errorf("the arguments are no JSON array: %s", args)
	}
	url := os.Getenv("NATS_URL")
	if url == "" {
		url = nats.DefaultURL
	}
	nc, err := nats.Connect(url, nats.Timeout(patience))
	if err != nil {
		return false, fmt.Errorf("cannot reach NATS at %s: %w", url, err)
	}
	defer nc.Close()
	job := Job{
		Version: 1, ID: nuid.Next(), Task: task, Args: json.RawMessage(args),
		MaxRetries: 2, Backoff: 2, CreatedAt: float64(time.Now().UnixMilli()) / 1000,
	}
	// Before the job: an event reaches the subscribers of its moment, and is not kept.
	events, err := nc.SubscribeSync("amq." + queue + ".event.*." + job.ID)
	if err != nil {
		return false, err
	}
	if err := add(nc, queue, job); err != nil {
		return false, err
	}
	fmt.Println("added", job.ID)
	return follow(nc, queue, job.ID, events)
}

// add publishes a job, again if no answer came: the server stores a message id once.
func add(nc *nats.Conn, queue string, job Job) error {
	message := nats.NewMsg("amq." + queue + ".ready.5." + job.ID)
	message.Header.Set("Nats-Msg-Id", job.ID)
	var err error
	if message.Data, err = json.Marshal(job); err != nil {
		return err
	}
	var answer *nats.Msg
	for attempt := 0; attempt < 3; attempt++ {
		answer, err = nc.RequestMsg(message, patience)
		if !errors.Is(err, nats.ErrTimeout) {
			break
		}
	}
	if errors.Is(err, nats.ErrNoResponders) {
		return fmt.Errorf("there is no queue %q: run a worker of it once", queue)
	}
	if err != nil {
		return fmt.Errorf("job %s may not have been added: %w", job.ID, err)
	}
	var ack PubAck
	if err := json.Unmarshal(answer.Data, &ack); err != nil {
		return err
	}
	if ack.Error != nil {
		return fmt.Errorf("job %s was not added: %s", job.ID, ack.Error.Description)
	}
	return nil
}

// follow prints the events of a job until it has ended, and returns whether it completed.
func follow(nc *nats.Conn, queue, id string, events *nats.Subscription) (bool, error) {
	for {
		what, body, err := next(nc, queue, id, events)
		if err != nil {
			return false, err
		}
		switch what {
		case "":
		case "completed", "failed", "expired", "cancelled":
			var outcome Outcome
			if err := json.Unmarshal(body, &outcome); err != nil {
				return false, err
			}
			if what == "completed" {
				fmt.Println("completed", string(outcome.Result))
			} else {
				fmt.Println(what, outcome.LastError)
			}
			return what == "completed", nil
		default:
			fmt.Println(what)
		}
	}
}

// next returns the next event and its body. Events are lost with a connection:
// when none has come for a while, it reads how the job has ended; "" if it has not.
func next(nc *nats.Conn, queue, id string, events *nats.Subscription) (string, []byte, error) {
	event, err := events.NextMsg(patience)
	if errors.Is(err, nats.ErrTimeout) {
		return readOutcome(nc, queue, id)
	}
	if err != nil || event.Header.Get("KV-Operation") != "" { // something was removed
		return "", nil, err
	}
	return strings.Split(event.Subject, ".")[3], event.Data, nil
}

// readOutcome returns how a job has ended, and its outcome; "" if it has not ended.
func readOutcome(nc *nats.Conn, queue, id string) (string, []byte, error) {
	bucket := "amq_" + queue + "_scheduler"
	keys := []string{}
	for _, what := range []string{"completed", "failed", "expired", "cancelled"} {
		keys = append(keys, "$KV."+bucket+".done."+id+"."+what)
	}
	request, err := json.Marshal(map[string]any{"multi_last": keys})
	if err != nil {
		return "", nil, err
	}
	answer, err := nc.Request("$JS.API.DIRECT.GET.KV_"+bucket, request, patience)
	if errors.Is(err, nats.ErrTimeout) {
		return "", nil, nil
	}
	if err != nil || answer.Header.Get("Status") == "404" {
		return "", nil, err
	}
	key := answer.Header.Get("Nats-Subject")
	return key[strings.LastIndex(key, ".")+1:], answer.Data, nil
}
