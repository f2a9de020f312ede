import logging
import threading

from anomalymatch.ui.training import Background


def test_what_is_asked_while_it_works_is_done_once_more():
    began, go, count = threading.Semaphore(0), threading.Semaphore(0), []

    def work():
        count.append(1)
        began.release()
        go.acquire()

    background = Background(work, "work")
    background.ask()
    began.acquire()
    for _ in range(5):
        background.ask()
    go.release()
    began.acquire()  # the second time, for all five
    go.release()
    background.close()
    assert len(count) == 2


def test_a_failure_is_logged_and_the_next_time_it_works_again(caplog):
    done, results = threading.Semaphore(0), [ValueError("broken"), None]

    def work():
        result = results.pop(0)
        done.release()
        if result:
            raise result

    background = Background(work, "re-ranking")
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            background.ask()
            done.acquire()
        background.close()
    assert "The re-ranking failed" in caplog.text
    assert "broken" in caplog.text
    assert results == []
