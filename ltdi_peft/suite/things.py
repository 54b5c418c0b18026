"""Domain of everyday things: what they are, what they are made of, what people do with them."""

from ltdi_peft.suite.design import Domain, alone, grouped, question

_THINGS = grouped(
    "group use material",
    """
    tool use metal: hammer saw axe pliers wrench screwdriver chisel nail drill file scissors tweezers
    tool use metal: spanner
    tool use metal: crowbar anvil shovel rake
    tool use wood: broom mallet ruler pencil matchstick
    tool use plastic: toothbrush comb bucket funnel sponge pen
    kitchenware use metal: fork spoon knife kettle saucepan frying_pan ladle whisk grater tin_opener
    kitchenware use clay: cup mug plate saucer teapot flowerpot
    kitchenware use glass: wineglass bottle jam_jar vase decanter
    kitchenware use wood: rolling_pin chopping_board chopsticks
    furniture use wood: table chair desk bookcase wardrobe cupboard stool bench shelf dresser cabinet bed
    furniture use cloth: sofa armchair cushion mattress hammock beanbag
    furniture use metal: filing_cabinet safe bunk_bed radiator
    furniture use glass: mirror window
    clothing wear cloth: shirt trousers jeans skirt dress jacket coat sweater socks scarf gloves hat cap
    clothing wear cloth: blouse vest
    clothing wear cloth: pyjamas tie shorts suit cardigan cloak apron tights uniform turban
    clothing wear leather: shoes boots belt sandals slippers moccasins
    jewellery wear metal: ring necklace bracelet earring brooch crown medal
    vehicle ride metal: car bus train tram lorry van motorcycle bicycle tractor taxi ambulance tank scooter
    vehicle ride metal: aeroplane helicopter ship ferry submarine rocket
    vehicle ride wood: canoe sledge raft cart rowing_boat wagon
    instrument play wood: violin guitar cello piano harp flute clarinet oboe banjo mandolin lute recorder
    instrument play metal: trumpet trombone tuba saxophone horn cymbal gong triangle bell
    toy play plastic: doll frisbee yo-yo toy_car beach_ball balloon
    toy play cloth: teddy_bear puppet rag_doll
    toy play wood: chessboard rocking_horse spinning_top jigsaw_puzzle
    fruit eat plant: apple pear banana orange lemon plum cherry grape peach apricot mango pineapple melon
    fruit eat plant: kiwi
    fruit eat plant: strawberry raspberry blueberry fig date lime coconut
    vegetable eat plant: carrot potato onion cabbage lettuce spinach cucumber pea bean leek celery radish
    vegetable eat plant: turnip
    vegetable eat plant: pumpkin garlic beetroot broccoli cauliflower parsnip
    reading read paper: book newspaper magazine letter notebook map diary comic dictionary leaflet novel
    reading read paper: atlas
    reading read paper: postcard calendar menu poster
    """,
)
THINGS = Domain(
    "things",
    _THINGS,
    (
        question(
            "group",
            "group",
            """Say what sort of thing this is.
               Name the class of things it belongs to.
               Is it a tool, clothing, furniture, a fruit, a toy or something else?
               Which category does this thing fall into?
               Sort the thing into its category.
               Item -> category, such as vehicle or toy.
               Could you tell me the general category, for example kitchenware or clothing?
               I will show you a thing; I need its class, such as vegetable or jewellery.
               What general word covers this item: instrument, furniture, tool or another?
               Group this item with its like, as a fruit, vehicle, toy and so on.""",
            """What type of object is it?
               Tell the category of the object.""",
        ),
        question(
            "material",
            "material",
            """Say what this thing is usually made of.
               Name the material of the thing.
               Of which material does it consist?
               Is it metal, wood, cloth, plant, paper, glass or plastic?
               What stuff is the thing made from?
               Item -> material, such as leather or clay.
               Could you tell me what material this item is typically made of?
               I am curious about a thing: which main material does it have?
               What is it chiefly made from: clay, leather, glass, metal, cloth, plant?
               Pick its material out of metal, plastic, wood, paper, cloth, plant and the like.""",
            """From which material does one produce the object?
               Tell the substance of the object.""",
        ),
        question(
            "use",
            "use",
            """Say what people do with this thing, in one verb.
               Name the verb that goes with it.
               Do people use, wear, ride, play, eat or read it?
               What does one do with the thing?
               Give the one verb for how the thing is used.
               Item -> verb: eat, wear, ride, play, read or use.
               Could you tell me which verb suits this item, such as "wear"?
               I will mention a thing; I need the verb for it, such as "eat".
               What do owners normally do with it: read, ride, play, wear, eat or use?
               One verb, please, for how somebody makes use of this item.""",
            """Which action belongs to the object?
               Tell what the object is there for, in one verb.""",
        ),
        question(
            "department",
            lambda i: {"eat": "food", "wear": "clothes", "play": "fun", "ride": "travel"}.get(
                i["use"], "home"
            ),
            """Say in which shop department this thing is sold.
               Choose its department: food, clothes, fun, travel or home.
               Which part of the shop sells it?
               Where in the department store would you look for it?
               Name the department of the shop for the thing.
               Item -> department: home, travel, fun, clothes or food.
               Could you tell me which shop department stocks this item, for example clothes?
               I want to buy this; point me to travel, home, food, fun or clothes.
               Where should a shop assistant shelve it: travel, food, clothes, home or fun?
               Assign the item to one shop department, such as home or fun.""",
            """Under which heading of the catalogue is the object: food, clothes, fun, travel, home?
               Tell the section of the store that has the object.""",
        ),
    ),
    (
        alone(
            "phrase",
            lambda i: f"{i['use']} the {i['input']}",
            """Write what to do with the thing: verb, "the", thing.
               Tell someone in three words what to do with it.
               Make a short command with the thing.
               Give an order that uses the thing.
               Put the fitting verb and "the" before the thing.
               Turn the thing into a short order.
               Write a command such as wear, eat or use with the thing.
               Form an instruction out of verb and thing.
               Thing -> "verb the thing", for example "ride the camel".
               Could you phrase a short command for this item, like "eat the soup"?
               I will give you a thing; I need an imperative: verb, "the", its name.
               What would you tell a person to do with it, in the style "read the sign"?""",
            """Build a brief order around the object.
               Command somebody to do the usual with the object.
               Verb, article, object: write that order.""",
        ),
    ),
)
